"""Published and measured figures side by side, as rows and as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from exp.comparison import mean_interval, paired_differences
from exp.metrics import compute_scores
from exp.reproduction.cells import Existing
from exp.reproduction.measured import Measured, Training, compare_seeds
from exp.reproduction.plans import ALL, find_counterpart, table_cells
from exp.reproduction.published import Figure, Table

NOTHING = "–"  # noqa: RUF001
HEADER = ("row", "data", "score", "of", "published", "measured", "measured - published", "95 % interval")
CSV_HEADER = ("table", "row", "data", "score", "of", "published", "measured", "difference", "low", "high", "erratum")
SCORES = ("Acc", "mIoUI", "mIoUC", "mIoUD", "mDiceI", "mDiceD", "mDice3D")


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
    for figure in table.figures:
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


def _argmax_beside(figure: Figure, table: Table) -> Figure | None:
    """The figure of argmax that a rule's is to be compared with; None where the table has none of that meaning."""
    if table.unit != "percent" or figure.rule == "argmax" or figure.column.endswith(("_std", "p")):
        return None
    place = (figure.row, figure.data, figure.column)
    same = (f for f in table.figures if (f.row, f.data, f.column) == place and f.rule == "argmax")
    return next(same, None)


def other_trainings(measured: Measured) -> list[Training]:
    """What lies below the folder and belongs to no table of the paper, such as laptop's; by name, length and seed."""
    paper = {cell.digest for cell in table_cells(ALL)}
    found = [t for digest, ts in _trainings(measured.existing, measured) if digest not in paper for t in ts]
    return sorted(found, key=lambda t: (t.name, t.iteration, t.config["seed"], len(t.place), t.place))


def training_titles(trainings: Sequence[Training]) -> list[str]:
    """A title each; further evaluations of one training have the names of their folders in it."""
    titles: list[str] = []
    for training in trainings:
        folder = PurePosixPath(training.place).parent.name
        titles.append(f"{training.title} ({folder})" if training.title in titles else training.title)
    return titles


def _trainings(existing: Existing, measured: Measured) -> Iterable[tuple[str, list[Training]]]:
    for digest, entries in sorted(existing.results.items()):
        folders: dict[tuple, list] = {}
        for path, content in entries:
            folders.setdefault((path.parent, content["training"]["iteration"]), []).append((path, content))
        found = []
        for (folder, iteration), members in sorted(folders.items()):
            results = {path.stem: measured.load(path) for path, _ in members}
            base = results.pop("argmax", None)
            same = [base, *(r for _, r in sorted(results.items()) if base is not None and r.names == base.names)]
            if base is not None and folder.parent.name != "older":
                content = members[0][1]
                test = content["config"]["test"]
                place = folder.parent.relative_to(measured.output).as_posix()
                judged = {"metric": test["metric"], "temperature": test["temperature"], "place": place}
                found.append(Training(folder, content["training"], iteration, results=tuple(same), **judged))
        yield digest, found


def format_number(value: float | None, signed: bool = False) -> str:
    """Two decimals; what would be zero then, such as a p-value, with its exponent."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 0.005:
        return f"{value:.2e}"
    return f"{value:{'+' if signed else ''}.2f}"


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


def markdown(tables: dict[str, tuple[Table, list[Row]]], others: Sequence[Training]) -> str:
    """Everything as one Markdown page."""
    parts = ["# Published and measured\n"]
    for name, (table, rows) in tables.items():
        parts.append(f"## {name}: {table.title}\n")
        if table.setting:
            parts.append(f"{table.setting}. In {table.unit}.\n")
        notes: dict[str, int] = {}
        lines = [_line(HEADER), _line(["---"] * 4 + ["---:"] * 4)]
        for row in rows:
            marks = "".join(f"[{notes.setdefault(note, len(notes) + 1)}]" for note in row.notes)
            cells = row_cells(row)
            cells[4] += f" {marks}" if marks else ""
            lines.append(_line(cells))
        parts.append("\n".join(lines) + "\n")
        parts += [f"[{number}] {text}\n" for text, number in notes.items()]
        parts += [f"{row}: {reason}\n" for row, reason in _reasons(rows).items()]
        missing = sum(row.measured is None and row.reason is None for row in rows)
        if missing:
            command = f"python scripts/reproduce.py {name} --data_dir DATA --output_dir OUTPUT"
            parts.append(f"{missing} of {len(rows)} lines are not measured yet: `{command}` fills them.\n")
    return "\n".join([*parts, *_other_parts(others)])


def _reasons(rows: Sequence[Row]) -> dict[str, str]:
    return {row.row: row.reason for row in rows if row.reason}


def _other_parts(others: Sequence[Training]) -> list[str]:
    if not others:
        return []
    parts = ["## Other trainings\n"]
    for title, training in zip(training_titles(others), others):
        parts += _training_parts(title, training)
    groups: dict[tuple, list[Training]] = {}
    for training in others:
        groups.setdefault(training.unseeded, []).append(training)
    for group in (g for g in groups.values() if len(g) > 1 and len(g[0].results) > 1):
        parts += _seed_parts(group)
    return parts


def _training_parts(title: str, training: Training) -> list[str]:
    header, rows = training_table(training)
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return [f"### {title}\n", "\n".join(lines) + "\n"]


def training_table(training: Training) -> tuple[list[str], list[list[str]]]:
    """A training -> the head, and a row a rule: scores, gain over argmax with its interval, units better and worse."""
    scores = {r.rule: compute_scores(r.counts, r.cases) for r in training.results}
    columns = [name for name in SCORES if name in scores["argmax"]]
    unit = "image" if training.results[0].cases is None else "case"
    rows = []
    for result in training.results:
        cells = [result.rule, *(f"{scores[result.rule][name]:.2f}" for name in columns)]
        if result.rule == "argmax":
            rows.append([*cells, "", ""])
            continue
        values = paired_differences(training.results[0], result, training.metric)
        better = f"{int((values > 0).sum())} / {int((values < 0).sum())}"
        rows.append([*cells, f"{values.mean():+.2f} {format_interval(mean_interval(values))}", better])
    return ["rule", *columns, f"{training.metric} against argmax", f"{unit}s better / worse"], rows


def _seed_parts(group: Sequence[Training]) -> list[str]:
    seeds = ", ".join(str(t.config["seed"]) for t in group)
    header, rows = seed_table(group)
    lines = [_line(header), _line(["---"] * len(header)), *map(_line, rows)]
    return [f"### {group[0].name}: seeds {seeds}\n", "\n".join(lines) + "\n", seed_note(group) + "\n"]


def seed_note(group: Sequence[Training]) -> str:
    """What the table of several seeds compares, and how many of each there are."""
    found = compare_seeds(group, group[0].results[1].rule)
    units = "images" if group[0].results[0].cases is None else "cases"
    return (
        f"{group[0].metric}, gains over argmax; ± is the standard deviation over the seeds. Over seeds: the paired "
        f"t-test, n = {len(group)} seeds. Over {units}: each one's gain averaged over the seeds, Wilcoxon's signed-rank"
        f" test and the interval, n = {found.num_units} {units} (the same in all seeds)."
    )


def seed_table(group: Sequence[Training]) -> tuple[list[str], list[list[str]]]:
    """Trainings of several seeds -> the head, and a row a rule: its score, and its gains over seeds and images."""
    metric = group[0].metric
    scores = {result.rule: _seed_scores(group, result.rule) for result in group[0].results}
    rows = [["argmax", scores["argmax"], *[""] * 6]]
    for result in group[0].results[1:]:
        found = compare_seeds(group, result.rule)
        rows.append(
            [
                result.rule,
                scores[result.rule],
                f"{np.mean(found.values):+.2f} ± {np.std(found.values, ddof=1):.2f}",
                " ".join(f"{value:+.2f}" for value in found.values),
                f"{found.seed_p:.2g}",
                f"{found.mean:+.2f} {format_interval(found.interval)}",
                f"{found.wins} / {found.losses}",
                f"{found.p_value:.2g}",
            ]
        )
    unit = "images" if group[0].results[0].cases is None else "cases"
    header = ["rule", metric, "gain over seeds", "gain a seed", "p over seeds"]
    return [*header, f"gain over {unit}", "better / worse", f"p over {unit}"], rows


def _seed_scores(group: Sequence[Training], rule: str) -> str:
    """The mean of a rule's score over the seeds, and its standard deviation."""
    results = [next(r for r in training.results if r.rule == rule) for training in group]
    values = [compute_scores(r.counts, r.cases)[group[0].metric] for r in results]
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def format_interval(interval: tuple[float, float] | None) -> str:
    return NOTHING if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}  # fmt: skip # noqa: RUF001


def latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def latex(tables: dict[str, tuple[Table, list[Row]]]) -> str:
    """Tables that may break over pages, one a published table, with errata as notes below."""
    parts = ["% Needs \\usepackage{booktabs,longtable}.\n"]
    head = " & ".join(map(latex_text, HEADER)) + " \\\\"
    for name, (table, rows) in tables.items():
        lines = ["{\\footnotesize", "\\begin{longtable}{llllrrrr}", f"\\caption{{{latex_text(table.title)}}}"]
        lines += [f"\\label{{tab:{name.replace('_', '-')}}} \\\\"]
        lines += ["\\toprule", head, "\\midrule", "\\endhead", "\\bottomrule", "\\endfoot"]
        notes: dict[str, int] = {}
        for row in rows:
            cells = [latex_text(cell) for cell in row_cells(row)]
            marks = ",".join(str(notes.setdefault(note, len(notes) + 1)) for note in row.notes)
            cells[4] += f"\\textsuperscript{{{marks}}}" if marks else ""
            lines.append(" & ".join(cells) + " \\\\")
        lines.append("\\end{longtable}")
        lines += [f"\\noindent\\textsuperscript{{{n}}} {latex_text(text)}\\par" for text, n in notes.items()]
        parts.append("\n".join([*lines, "}\n"]))
    return "\n".join(parts)


def csv_text(tables: dict[str, tuple[Table, list[Row]]]) -> str:
    """A line a figure, at full precision; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for _, rows in tables.values():
        for row in rows:
            numbers = (row.published, row.measured, row.difference, *(row.interval or (None, None)))
            place = (row.table, row.row, row.data, row.score, row.of)
            writer.writerow([*place, *("" if n is None else repr(float(n)) for n in numbers), " ".join(row.notes)])
    return text.getvalue()
