"""How far a long loop is: a bar on a terminal, elsewhere, such as in a file, a line every minute."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")
C = TypeVar("C", covariant=True)
INTERVAL = 60.0  # seconds between two lines


class Sized(Protocol[C]):
    """A list, say, or a loader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[C]: ...


def follow(items: Sized[T], what: str, unit: str, *, shown: bool = True) -> Iterator[T]:
    """The items one by one; what is being done with them is shown on stderr.

    shown: False on all processes but one.
    """
    bar = tqdm(items, desc=what, unit=unit, leave=False, disable=None if shown else True)
    if not shown or not bar.disable:
        yield from bar
        return
    total, start = len(items), time.monotonic()
    said = start
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= INTERVAL and done < total:
            left = time.strftime("%-H:%M:%S", time.gmtime((now - start) / done * (total - done)))
            with suppress(OSError):  # of a full disk, say: no reason to stop
                print(f"{what}: {done} of {total} {unit} done, {left} left", file=sys.stderr, flush=True)
            said = now
