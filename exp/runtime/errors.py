"""What a user can cause is told in one line; everything else keeps its traceback."""

import errno
import os
import select
import sys
from collections.abc import Callable, Iterable

from exp.runtime.interrupt import STATUS, Interrupted

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class InputError(ValueError):
    """Wrong input of the user's: one line that says where, what was got and what was expected."""


def printable(text: str) -> str:
    """Text with what no line should hold (line breaks, terminal escapes, bytes that are no UTF-8) written as escapes.

    Names of files and keys of strangers get into messages, and could otherwise forge lines or drive the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def describe_numbers(numbers: Iterable[int], separator: str = " or ") -> str:
    """Ascending whole numbers -> the same in words: [0, 1, 2, 255] -> '0..2 or 255'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return separator.join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def run_and_report(main: Callable[[], None]) -> int:
    """Run main() -> exit status: 0; 2 with one line on stderr for what the user can put right; 75 where it was asked to
    stop and can go on; 130 after Ctrl-C at once; 141 where nobody reads its output any more, as after `| head`."""
    try:
        main()
    except Interrupted as interruption:
        if str(interruption):
            print(f"interrupted by {interruption}; the same command goes on", file=sys.stderr, flush=True)
        return STATUS
    except (
        InputError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_output_gone():
            return 141
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {printable(str(error))}; make room and start the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _is_output_gone() -> bool:
    """Whether the reader of stdout has left; what is still to be written goes nowhere then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
