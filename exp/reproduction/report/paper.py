"""The paper's tables as sections: published values beside measured ones."""

from collections.abc import Sequence

from exp.reproduction.measured import PAIRED, Measured
from exp.reproduction.plans import find_counterpart
from exp.reproduction.published import PublishedValue, Table
from exp.reproduction.report.sections import Cell, Line, Section, format_interval, format_number
from exp.reproduction.report.trainings import Trainings

GROUP = "Published tables"
HEADER = ("row", "data", "score", "of", "published", "measured", "measured - published", "95 % interval")


def published_section(table: Table, measured: Measured) -> Section:
    """A published table -> its section: errata as footnotes, and what is not measured with its reason or command."""
    lines = table_lines(table, measured)
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
                Cell("not available" if line.reason else format_number(line.measured, line.is_gain)),
                Cell(format_number(line.difference, signed=True)),
                Cell(format_interval(line.interval)),
            )
        )
    notes = [f"{row}: {reason}" for row, reason in {line.row: line.reason for line in lines if line.reason}.items()]
    missing = sum(line.measured is None and line.reason is None for line in lines)
    if missing:
        command = f"python scripts/reproduce.py {table.name} --data_dir DATA --output_dir OUTPUT"
        notes.append(f"{missing} of {len(lines)} lines are not measured yet: `{command}` fills them.")
    return Section(
        key=table.name,
        group=GROUP,
        title=f"{table.name}: {table.title}",
        header=HEADER,
        rows=tuple(rows),
        lead=f"{table.setting}. In {table.unit}." if table.setting else f"In {table.unit}.",
        footnotes=tuple(footnotes),
        notes=tuple(notes),
        lines=tuple(lines),
    )


def table_lines(table: Table, measured: Measured) -> list[Line]:
    """Published values beside the measured ones, and after each rule's what it gains over argmax."""
    lines = []
    for value in (value for value in table.values if value.value is not None):
        found = find_counterpart(value)
        notes = tuple(erratum.text for erratum in value.errata)
        place = (value.table, value.row, value.data, value.column)
        if isinstance(found, str):
            lines.append(Line(*place, value.rule, value.value, None, notes=notes, reason=found))
            continue
        lines.append(Line(*place, value.rule, value.value, measured.value(found), notes=notes))
        base = _argmax_beside(value, table)
        if base is not None:
            gain, interval = measured.gain(find_counterpart(base), found)
            both = tuple(dict.fromkeys((*(erratum.text for erratum in base.errata), *notes)))
            published = value.value - base.value
            lines.append(Line(*place, f"{value.rule} - argmax", published, gain, interval, notes=both))
    return lines


def _argmax_beside(value: PublishedValue, table: Table) -> PublishedValue | None:
    """The value of argmax that a rule's is to be compared with; None where the table has none of that meaning."""
    if table.unit != "percent" or value.rule == "argmax" or value.column.endswith(("_std", "p")):
        return None
    place = (value.row, value.data, value.column, "argmax")
    return next((v for v in table.values if (v.row, v.data, v.column, v.rule) == place), None)


def summary(lines: Sequence[Line], trainings: Trainings) -> str:
    """Of all published values how many were measured, and how often the other trainings agree with the paper."""
    published = [line for line in lines if line.published is not None and not line.is_gain]
    known = sum(line.measured is not None for line in published)
    parts = [f"Measured: {known} of the {len(published)} published figures."]
    pairs = [c for t in trainings.others for c in t.comparisons if (c.rule, c.metric) == ("rankseg_rma", t.metric)]
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
