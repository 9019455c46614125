"""Published and measured figures side by side, as rows and as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exp.evaluation.metrics import compute_scores
from exp.reproduction.measured import PAIRED, Measured, Training
from exp.reproduction.plans import find_counterpart
from exp.reproduction.published import PublishedValue, Table
from exp.reproduction.report.formats import (
    format_interval,
    format_number,
    latex_table,
    latex_text,
    markdown_line,
    markdown_table,
)
from exp.reproduction.report.sections import (
    SCORES,
    Section,
    Trainings,
    joint_sections,
    training_section,
    training_titles,
)

HEADER = ("row", "data", "score", "of", "published", "measured", "measured - published", "95 % interval")
LATEX_BEGIN = "\\begin{landscape}\\scriptsize\\sloppy\\setlength{\\tabcolsep}{3pt}\n"
CSV_HEADER = ("table", "row", "data", "score", "of", "published", "measured", "difference", "low", "high", "erratum")


@dataclass(frozen=True)
class Row:
    """One line of a table. of: the rule, or what it gains over argmax. reason: why there is no measured value."""

    table: str
    row: str
    data: str
    score: str
    of: str
    published: float | None
    measured: float | None
    interval: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def difference(self) -> float | None:
        known = self.published is not None and self.measured is not None and self.score != "p"
        return self.measured - self.published if known else None


def table_rows(table: Table, measured: Measured) -> list[Row]:
    """A published table -> its figures beside the measured ones, and after each rule's what it gains over argmax."""
    rows = []
    for figure in table.values:
        if figure.value is None:
            continue
        found = find_counterpart(figure)
        notes = tuple(erratum.text for erratum in figure.errata)
        place = (figure.table, figure.row, figure.data, figure.column)
        if isinstance(found, str):
            rows.append(Row(*place, figure.rule, figure.value, None, notes=notes, reason=found))
            continue
        rows.append(Row(*place, figure.rule, figure.value, measured.value(found), notes=notes))
        base = _argmax_beside(figure, table)
        if base is not None:
            gain = measured.gain(find_counterpart(base), found)
            published = figure.value - base.value
            value, interval = (None, None) if gain is None else (gain.value, gain.interval)
            both = tuple(dict.fromkeys((*(erratum.text for erratum in base.errata), *notes)))
            rows.append(Row(*place, f"{figure.rule} - argmax", published, value, interval, notes=both))
    return rows


def _argmax_beside(figure: PublishedValue, table: Table) -> PublishedValue | None:
    """The figure of argmax that a rule's is to be compared with; None where the table has none of that meaning."""
    if table.unit != "percent" or figure.rule == "argmax" or figure.column.endswith(("_std", "p")):
        return None
    place = (figure.row, figure.data, figure.column)
    same = (f for f in table.values if (f.row, f.data, f.column) == place and f.rule == "argmax")
    return next(same, None)


def row_cells(row: Row) -> list[str]:
    """A row as text, a cell a column of HEADER."""
    gain = row.of.endswith("- argmax")
    return [
        row.row,
        row.data,
        row.score,
        row.of,
        format_number(row.published, gain),
        "not available" if row.reason else format_number(row.measured, gain),
        format_number(row.difference, True),
        format_interval(row.interval),
    ]


def summary(rows: Sequence[Row], trainings: Trainings) -> str:
    """Of all published figures how many were measured, and how often the other trainings agree with the paper."""
    published = [row for row in rows if row.published is not None and not row.of.endswith("- argmax")]
    known = sum(row.measured is not None for row in published)
    parts = [f"Measured: {known} of the {len(published)} published figures."]
    pairs = [c for t in trainings.others for c in t.comparisons if (c.rule, c.metric) == ("rankseg_rma", t.metric)]
    if pairs:
        metrics = " or ".join(dict.fromkeys(c.metric for c in pairs))
        above = sum(c.interval is not None and c.interval[0] > 0 for c in pairs)
        below = sum(c.interval is not None and c.interval[1] < 0 for c in pairs)
        gains = [row.published for row in rows if row.of == "rankseg_rma - argmax" and row.score in PAIRED]
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


def other_sections(trainings: Trainings) -> list[Section]:
    """A table each for trainings of which the paper has none, and for what they say together, which comes first."""
    titles = training_titles(trainings.all_others)
    own = [
        training_section(f"training-{i}", title, t) for i, (title, t) in enumerate(zip(titles, trainings.all_others))
    ]
    return [*joint_sections(trainings), *own]


def markdown(tables: dict[str, tuple[Table, list[Row]]], others: Sequence[Section], lead: str) -> str:
    """Everything as one Markdown page: what comes first is `lead`, then what was measured (see published_first)."""
    published = [part for name, (table, rows) in tables.items() for part in _table_parts(name, table, rows)]
    own = ["## Other trainings\n"] if others else []
    for section in others:
        own += [f"### {section.title}\n", markdown_table(section.header, section.rows)]
        own += [f"{note}\n" for note in section.notes]
    parts = [*published, *own] if published_first(tables) else [*own, *published]
    return "\n".join(["# Published and measured\n", f"{lead}\n", *parts])


def published_first(tables: dict[str, tuple[Table, list[Row]]]) -> bool:
    """Whether any line of the published tables was measured: then they stand before the other trainings."""
    return any(row.measured is not None for _, rows in tables.values() for row in rows)


def _table_parts(name: str, table: Table, rows: Sequence[Row]) -> list[str]:
    parts = [f"## {name}: {table.title}\n"]
    if table.setting:
        parts.append(f"{table.setting}. In {table.unit}.\n")
    notes: dict[str, int] = {}
    lines = [markdown_line(HEADER), markdown_line(["---"] * 4 + ["---:"] * 4)]
    for row in rows:
        marks = "".join(f"[{notes.setdefault(note, len(notes) + 1)}]" for note in row.notes)
        cells = row_cells(row)
        cells[4] += f" {marks}" if marks else ""
        lines.append(markdown_line(cells))
    parts.append("\n".join(lines) + "\n")
    parts += [f"[{number}] {text}\n" for text, number in notes.items()]
    parts += [f"{row}: {reason}\n" for row, reason in _reasons(rows).items()]
    missing = sum(row.measured is None and row.reason is None for row in rows)
    if missing:
        command = f"python scripts/reproduce.py {name} --data_dir DATA --output_dir OUTPUT"
        parts.append(f"{missing} of {len(rows)} lines are not measured yet: `{command}` fills them.\n")
    return parts


def _reasons(rows: Sequence[Row]) -> dict[str, str]:
    return {row.row: row.reason for row in rows if row.reason}


def latex(tables: dict[str, tuple[Table, list[Row]]], others: Sequence[Section]) -> str:
    """Tables that may break over pages, one a published table, with errata as notes below, and one a section."""
    parts = ["% Needs \\usepackage{booktabs,longtable,pdflscape}.", LATEX_BEGIN]
    for name, (table, rows) in tables.items():
        notes: dict[str, int] = {}
        lines = []
        for row in rows:
            cells = [latex_text(cell) for cell in row_cells(row)]
            marks = ",".join(str(notes.setdefault(note, len(notes) + 1)) for note in row.notes)
            cells[4] += f"\\textsuperscript{{{marks}}}" if marks else ""
            lines.append(" & ".join(cells))
        lines = latex_table(table.title, name.replace("_", "-"), "llllrrrr", HEADER, lines)
        lines += [f"\\noindent\\textsuperscript{{{n}}} {latex_text(text)}\\par" for text, n in notes.items()]
        parts += [*lines, ""]
    for section in others:
        rows = (" & ".join(map(latex_text, row)) for row in section.rows)
        lines = latex_table(section.title, section.key, "l" * len(section.header), section.header, rows)
        parts += [*lines, *(f"\\noindent {latex_text(note)}\\par" for note in section.notes), ""]
    return "\n".join([*parts, "\\end{landscape}\n"])


def csv_text(tables: dict[str, tuple[Table, list[Row]]], trainings: Trainings) -> str:
    """A line a figure, at full precision; empty where nothing was measured. The table of other trainings is "other"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in (row for _, rows in tables.values() for row in rows):
        place = (row.table, row.row, row.data, row.score, row.of)
        numbers = (row.published, row.measured, row.difference, *(row.interval or (None, None)))
        writer.writerow([*place, *map(_csv_number, numbers), " ".join(row.notes)])
    for title, training in zip(training_titles(trainings.all_others), trainings.all_others):
        writer.writerows(_training_lines(title, training))
    return text.getvalue()


def _training_lines(title: str, training: Training) -> Iterable[list[str]]:
    """Scores of all rules, then gains over argmax with their intervals."""
    data = training.config["data"]["name"]
    for result in training.results:
        scores = compute_scores(result.counts, result.cases)
        for name in (name for name in SCORES if name in scores):
            yield ["other", title, data, name, result.rule, "", _csv_number(scores[name]), "", "", "", ""]
    for c in training.comparisons:
        numbers = map(_csv_number, (c.difference, None, *(c.interval or (None, None))))
        yield ["other", title, data, c.metric, f"{c.rule} - argmax", "", *numbers, ""]


def _csv_number(value: float | None) -> str:
    return "" if value is None else repr(float(value))
