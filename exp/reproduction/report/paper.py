"""The paper's tables as sections: published values beside measured ones."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exp.reproduction.measured import PAIRED, Interval, Measured, Training
from exp.reproduction.plans import find_counterpart, ours_beside
from exp.reproduction.published import PublishedValue, Table
from exp.reproduction.report.sections import Cell, Section, format_interval, format_number

GROUP = "Published tables"
HEADER = (
    "row", "data", "score", "of", "published", "measured", "measured - published", "95 % interval", "shipped rule"
)  # fmt: skip
CSV_HEADER = (
    "table", "row", "data", "score", "of", "published", "measured", "difference", "low", "high", "shipped", "erratum"
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a published table. of: the rule, or what it gains over argmax.

    measured: under the rule to the paper's letter; shipped: under this project's own, on the same probabilities.
    """

    table: str
    row: str
    data: str
    score: str
    of: str
    published: float
    measured: float | None
    interval: Interval | None = None
    shipped: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_gain(self) -> bool:
        return self.of.endswith("- argmax")

    @property
    def difference(self) -> float | None:
        return None if self.measured is None or self.score == "p" else self.measured - self.published


def published_section(table: Table, lines: Sequence[Line]) -> Section:
    """A published table -> its section: errata as footnotes, and the command for what is not measured."""
    footnotes: dict[str, int] = {}
    rows = []
    for line in lines:
        marks = tuple(footnotes.setdefault(note, len(footnotes) + 1) for note in line.notes)
        rows.append(
            (
                Cell(line.row),
                Cell(line.data),
                Cell(line.score),
                Cell(line.of),
                Cell(format_number(line.published, line.is_gain), marks),
                Cell(format_number(line.measured, line.is_gain)),
                Cell(format_number(line.difference, signed=True)),
                Cell(format_interval(line.interval)),
                Cell(format_number(line.shipped, line.is_gain)),
            )
        )
    notes = ()
    missing = sum(line.measured is None for line in lines)
    if missing:
        command = f"python scripts/reproduce.py {table.name} --data_dir DATA --output_dir OUTPUT"
        notes = (f"{missing} of {len(lines)} lines are not measured yet: `{command}` fills them.",)
    return Section(
        key=table.name,
        group=GROUP,
        title=f"{table.name}: {table.title}",
        header=HEADER,
        rows=tuple(rows),
        lead=f"{table.setting}. In {table.unit}." if table.setting else f"In {table.unit}.",
        footnotes=tuple(footnotes),
        notes=notes,
    )


def table_lines(table: Table, measured: Measured) -> list[Line]:
    """Published values beside the measured ones, and after each rule's what it gains over argmax."""
    lines = []
    for value in (value for value in table.values if value.value is not None):
        found = find_counterpart(value)
        notes = tuple(erratum.text for erratum in value.errata)
        place = (value.table, value.row, value.data, value.column)
        ours = ours_beside(found)
        shipped = None if ours is None else measured.value(ours)
        lines.append(Line(*place, value.rule, value.value, measured.value(found), shipped=shipped, notes=notes))
        base = _argmax_beside(value, table)
        if base is not None:
            gain, interval = measured.gain(find_counterpart(base), found)
            own_gain = None if ours is None else measured.gain(find_counterpart(base), ours)[0]
            both = tuple(dict.fromkeys((*(erratum.text for erratum in base.errata), *notes)))
            published = value.value - base.value
            lines.append(Line(*place, f"{value.rule} - argmax", published, gain, interval, own_gain, both))
    return lines


def _argmax_beside(value: PublishedValue, table: Table) -> PublishedValue | None:
    """The value of argmax that a rule's is to be compared with; None where the table has none of that meaning."""
    if table.unit != "percent" or value.rule == "argmax" or value.column.endswith(("_std", "p")):
        return None
    place = (value.row, value.data, value.column, "argmax")
    known = (v for v in table.values if v.value is not None)
    return next((v for v in known if (v.row, v.data, v.column, v.rule) == place), None)


def summary(lines: Sequence[Line], others: Sequence[Training]) -> str:
    """Of all published values how many were measured, and how often the other trainings agree with the paper."""
    published = [line for line in lines if not line.is_gain]
    known = sum(line.measured is not None for line in published)
    parts = [f"Measured: {known} of the {len(published)} published figures."]
    ours = [(c, t.metric) for t in others if t.is_trained for c in t.comparisons if c.rule == "rankseg_rma"]
    pairs = [c for c, metric in ours if c.metric == metric]
    if pairs:
        metrics = " or ".join(dict.fromkeys(c.metric for c in pairs))
        above = sum(c.interval is not None and c.interval[0] > 0 for c in pairs)
        below = sum(c.interval is not None and c.interval[1] < 0 for c in pairs)
        gains = [line.published for line in lines if line.of == "rankseg_rma - argmax" and line.score in PAIRED]
        parts.append(
            f"In {len(pairs)} evaluations of trainings that are not the paper's, the images' {metrics} was higher "
            f"under rankseg_rma than under argmax with the whole interval in {above}, lower in {below}; in print it is "
            f"higher in {sum(gain > 0 for gain in gains)} of {len(gains)} pairs of figures."
        )
    parts.append(
        "Scores in percent; gains in percent points, with 95 % bootstrap intervals over images, or over cases where "
        "images are slices of volumes. Where there are several seeds, scores and each image's gain are means over them."
    )
    return " ".join(parts)


def csv_text(lines: Iterable[Line]) -> str:
    """Lines at full precision; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for line in lines:
        interval = line.interval or (None, None)
        numbers = (line.published, line.measured, line.difference, *interval, line.shipped)
        texts = ("" if number is None else repr(float(number)) for number in numbers)
        writer.writerow([line.table, line.row, line.data, line.score, line.of, *texts, " ".join(line.notes)])
    return text.getvalue()
