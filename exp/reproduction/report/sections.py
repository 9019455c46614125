"""The report as plain data: sections with a table each, which the writers lay out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from exp.evaluation.comparison import Comparison
from exp.reproduction.measured import Interval, Training

NOTHING = "–"  # noqa: RUF001
WIDE = 60  # characters, from which on a column breaks its lines
NUMBER = re.compile(rf"[-+]?\d+(\.\d+)?(e[-+]\d+)?|\[.*\]|{NOTHING}")


@dataclass(frozen=True)
class Cell:
    """A cell of a table. marks: the numbers of its footnotes, from 1.

    On the page alone: link, the key of what it leads to there; tone, how it stands out: gain, loss, heavy.
    """

    text: str
    marks: tuple[int, ...] = ()
    link: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Section:
    """A table under a title. In its texts, what stands between backticks is code.

    key: unlike any other section's, for links. group: the heading that it stands under with others. lead: above the
    table. On the page alone: details, further tables; source, what plots are drawn and pictures shown of.
    """

    key: str
    group: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    lead: str = ""
    footnotes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: tuple["Section", ...] = ()
    source: Training | None = None

    @property
    def flush_right(self) -> tuple[bool, ...]:
        """By column whether it has numbers and intervals alone."""
        return tuple(all(NUMBER.fullmatch(cell.text) for cell in column) for column in zip(*self.rows))

    @property
    def wide(self) -> tuple[bool, ...]:
        """By column whether its text is too long for one line."""
        return tuple(max(len(cell.text) for cell in column) > WIDE for column in zip(*self.rows))


def text_rows(rows: Iterable[Iterable[str]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of text -> rows of cells without footnotes."""
    return tuple(tuple(map(Cell, row)) for row in rows)


def format_number(value: float | None, signed: bool = False) -> str:
    """Two decimals; what would be zero then, such as a p-value, with its exponent."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 0.005:
        return f"{value:.2e}"
    return f"{value:{'+' if signed else ''}.2f}"


def format_interval(interval: Interval | None) -> str:
    return NOTHING if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def format_gain(comparison: Comparison) -> str:
    """A difference in percent points, two decimals, and its interval."""
    value = comparison.difference
    return NOTHING if value is None else f"{value:+.2f} {format_interval(comparison.interval)}"
