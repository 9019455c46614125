"""What a user can cause is told in one line; everything else keeps its traceback."""

import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exp.runtime.interrupt import STATUS, Interrupted

NO_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # in PyTorch's messages, of GPUs and CPUs
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What PyTorch says of tensors that do not fit together.
SIZE_TROUBLE = ("must match the size", "is invalid for input of size", "Sizes of tensors must match")


class InputError(ValueError):
    """Wrong input of the user's: one line that says where, what was got and what was expected."""


PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


@contextmanager
def decoding(path: Path, expected: str) -> Iterator[None]:
    """Inside, libraries read a file: what they raise on a damaged one, or one of another kind, is an InputError.

    That is nearly everything: struct.error, zlib.error, KeyError, SyntaxError, RecursionError, MemoryError, ...
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected {expected}") from None
    except Exception as error:
        raise unreadable(path, error, expected) from error


def one_line(reason: object) -> str:
    """What a library raised -> its text as one line, cut between words after some 200 characters."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " ..."


def unreadable(path: Path, reason: object, expected: str) -> InputError:
    text = re.sub(r" ?<\S+ object at 0x[0-9a-f]+>", "", str(reason))  # of what a library was given in the file's place
    reason = one_line(text) or type(reason).__name__
    return InputError(f"{path}: got a file that cannot be read ({reason}), expected {expected}")


@contextmanager
def passing_over() -> Iterator[None]:
    """An InputError of the body is a warning on stderr: the file that it names is one of many."""
    try:
        yield
    except InputError as error:
        print(printable(f"warning: left out: {error}"), file=sys.stderr, flush=True)


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


@contextmanager
def memory_named() -> Iterator[None]:
    """Inside, where a network runs: memory that does not suffice is an InputError that names what takes it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = one_line(error)
        if not (isinstance(error, MemoryError) or any(words in reason for words in NO_MEMORY)):
            raise
        raise InputError(
            f"got too little memory ({reason or 'MemoryError'}), expected more; less is taken by a smaller "
            "schedule.batch_size or data.crop_size, by schedule.accumulation and schedule.amp=bf16, and in an "
            "evaluation by test.window_batch=1 and a smaller test.crop_size"
        ) from None


def run_and_report(main: Callable[[], None]) -> int:
    """Run main() -> exit status: 0; 2 with one line on stderr for what the user can put right; 75 where it was asked to
    stop and can resume; 130 after Ctrl-C at once; 141 where nobody reads its output any more, as after `| head`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file that cannot show a character gets an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except Interrupted as interruption:
        if str(interruption):
            print(f"interrupted by {interruption}; the same command resumes", file=sys.stderr, flush=True)
        return STATUS
    except (InputError, *PATH_ERRORS) as error:
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
    poll = select.poll()  # a flush says nothing: what could not be written may be dropped by then
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextmanager
def sizes_named(image: Any) -> Iterator[None]:
    """Inside, a network sees an image: what layers say of sizes that they cannot take is an InputError."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        text, (batch, _, height, width) = " ".join(str(error).split()), image.shape
        if "more than 1 value per channel" in text:
            raise InputError(
                f"schedule.batch_size: got {batch} image per process (and micro-batch) of {height}x{width} "
                "(data.crop_size), expected more or larger ones: a layer normalises over a single value"
            ) from None
        if isinstance(error, AssertionError) or any(words in text for words in SIZE_TROUBLE):
            raise InputError(
                f"model.encoder: got images of {height}x{width} (data.crop_size, test.crop_size), which this network "
                f"cannot take ({text[:120] or 'an assertion of it'}), expected those of another size, such as that of "
                "its pretraining"
            ) from error
        raise
