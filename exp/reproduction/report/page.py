"""The report as one self-contained HTML page: no script, nothing from elsewhere, everything from files escaped."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from exp.evaluation.metrics import EvalResult, class_scores, image_scores
from exp.evaluation.results import IMAGES, load_entropy
from exp.files.atomic import write_atomically
from exp.files.images import open_image
from exp.files.text import read_json
from exp.reproduction.measured import Measured, Training, read_times
from exp.reproduction.published import Table, load_tables
from exp.reproduction.report import plots
from exp.reproduction.report.readme import update_readme
from exp.reproduction.report.rows import (
    HEADER,
    Row,
    csv_text,
    latex,
    markdown,
    other_sections,
    published_first,
    row_cells,
    summary,
    table_rows,
)
from exp.reproduction.report.sections import Section, Trainings, find_trainings, training_section, training_titles
from exp.reproduction.report.series import Series
from exp.runtime.errors import InputError

STYLES = Path(__file__).with_name("page.css")
PANEL_WIDTH = 1000  # pixels
SHOWN_RULES = ("argmax", "rankseg_rma")  # of the validations in training
KINDS = {"gain": "largest gain", "loss": "largest loss", "random": "at random"}


def write_report(output: Path, readme: Path | None = None) -> Path:
    """Write <output>/report/tables.{md,tex,csv} and index.html from the results below `output` -> the folder.

    readme: a file in which the results between two marks are renewed, too.
    """
    measured = Measured(output)
    tables = {name: (table, table_rows(table, measured)) for name, table in load_tables().items()}
    rows = [row for _, rows in tables.values() for row in rows]
    trainings = find_trainings(measured)
    others = other_sections(trainings)
    lead = summary(rows, trainings)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tables.md", markdown(tables, others, lead))
    write_atomically(folder / "tables.tex", latex(tables, others))
    write_atomically(folder / "tables.csv", csv_text(tables, trainings))
    write_atomically(folder / "index.html", build_page(tables, trainings, others, lead))
    if readme is not None:
        update_readme(readme, lead, trainings)
    return folder


def build_page(
    tables: dict[str, tuple[Table, list[Row]]], trainings: Trainings, others: Sequence[Section], lead: str
) -> str:
    """Published tables with their rows, trainings, the sections of those that are in no table, and what comes first ->
    HTML. What was measured stands before what was not (see published_first)."""
    more = {f"training-{i}": _plots(training) for i, training in enumerate(trainings.all_others)}
    more |= {f"series-{i}": _series_plot(series) for i, series in enumerate(trainings.series)}
    own = [(section.key, section.title, _section(section, more.get(section.key, ""))) for section in others]
    published = [
        (name, f"{name}: {table.title}", _published(name, table, rows)) for name, (table, rows) in tables.items()
    ]
    shown = [t for t in trainings.paper if t.config["seed"] == 0 and t.config["data"].get("fold") in (None, 0)]
    for i, (title, training) in enumerate(zip(training_titles(shown), shown)):
        section = training_section(f"paper-{i}", title, training)
        published.append((section.key, title, _section(section, _plots(training))))
    return _document(lead, [*published, *own] if published_first(tables) else [*own, *published])


def _document(lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """What comes first, and (key, title, HTML) of sections -> the page."""
    contents = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>' for key, title, content in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>RankSEG-RMA: published and measured</title><style>{STYLES.read_text(encoding='utf-8')}</style></head>"
        f"<body><header><h1>RankSEG-RMA: published and measured</h1><p>{escape(lead)}</p></header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main>{body}</main></body></html>\n'
    )


def _section(section: Section, more: str) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in section.notes)
    return _html_table(section.header, [[escape(cell) for cell in row] for row in section.rows]) + notes + more


def _series_plot(series: Series) -> str:
    """Gains of every rule, under each source of probabilities, along what varies."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for step in series.steps:
        for rule in step.rules[1:]:
            found = step.gain(rule)
            if found.interval is not None:
                name = f"{rule}, {step.source}" if step.source else rule
                lines.setdefault(name, []).append((step.value, found.mean, *found.interval))
    svg = plots.gains_along(lines, series.label, series.training.metric)
    return f'<div class="plots">{_image(svg, f"{series.title}, with 95 % intervals", wide=True)}</div>'


def _published(name: str, table: Table, rows: Sequence[Row]) -> str:
    notes: dict[str, int] = {}
    body = []
    for row in rows:
        cells = [escape(cell) for cell in row_cells(row)]
        cells[4] += "".join(f"<sup>{notes.setdefault(note, len(notes) + 1)}</sup>" for note in row.notes)
        body.append(cells)
    setting = f"<p>{escape(table.setting)}</p>" if table.setting else ""
    foot = "".join(f"<li>{escape(note)}</li>" for note in notes)
    missing = sum(row.measured is None and row.reason is None for row in rows)
    command = f"python scripts/reproduce.py {name} --data_dir DATA --output_dir OUTPUT"
    fill = f"<p>{missing} of {len(rows)} lines are not measured yet: <code>{command}</code> fills them.</p>"
    return setting + _html_table(HEADER, body) + (f"<ol>{foot}</ol>" if foot else "") + (fill if missing else "")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(training: Training) -> str:
    """Where the training lies, its plots and its pictures."""
    parts = [f"<p>From <code>{escape(training.place)}</code>.</p>"]
    if len(training.results) > 1:
        parts.append(_comparisons(training))
    run = training.folder.parent
    drawings = [*_calibration(training.folder), *_times(training.folder), *_curves(run / "log.jsonl")]
    parts.append(f'<div class="plots">{"".join(drawings)}</div>' if drawings else "")
    return "".join([*parts, _gallery(run / "pictures")])


def _comparisons(training: Training) -> str:
    base, other = training.results[:2]
    rule, metric = other.rule, training.metric
    first, second = (image_scores(result.counts)[metric] for result in (base, other))
    both = ~(np.isnan(first) | np.isnan(second))
    gains = (second - first)[both]
    sizes, objects, score = gains_of_objects(base, other, metric)
    drawings = [
        (plots.scatter_scores(first[both], second[both], rule, metric), f"{metric} of each image under both rules"),
        (plots.histogram_gains(gains, rule, metric), f"Gains of {rule}"),
        (
            plots.gains_by(objects, sizes, "area of a class in an image, %", rule, score, log=True),
            f"Gain of {rule} against the size of objects: a dot for each class in each image",
        ),
    ]
    entropy, note = _entropy(training.folder / IMAGES, base), ""
    if entropy is not None:
        known = both & ~np.isnan(entropy)
        svg = plots.gains_by((second - first)[known], entropy[known], "mean entropy of the image, nats", rule, metric)
        drawings.append((svg, f"Gain of {rule} against the network's uncertainty"))
    else:
        note = "<p>Gain against the network's uncertainty: these results came without the entropy of the images.</p>"
    return f'<div class="plots">{"".join(_image(svg, alt) for svg, alt in drawings)}</div>{note}'


def _entropy(path: Path, result: EvalResult) -> np.ndarray | None:
    """(N,) the mean entropy of the images, NaN where one has none; None without a file of the same images."""
    if not path.is_file():
        return None
    by_name = load_entropy(path)
    values = np.array([by_name.get(name, np.nan) for name in result.names])
    return None if np.isnan(values).all() else values


def gains_of_objects(base: EvalResult, other: EvalResult, metric: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Two rules -> of each class in each image's label its share of the counted pixels, in percent, (K,); what its
    score gains, in percent points, (K,); and which score that is: the metric's. With two classes the foreground alone.

    By class, as the mean over an image's classes tells little of size where all classes are in all images.
    """
    score = metric.removeprefix("m")[:-1]
    sizes = base.counts[:, 0] + base.counts[:, 2]  # TP + FN
    chosen = sizes > 0
    chosen[:, 0] &= sizes.shape[1] > 2
    shares = 100 * sizes / np.maximum(sizes.sum(1, keepdims=True), 1)
    first, second = (class_scores(result.counts)[score] for result in (base, other))
    return shares[chosen], (second - first)[chosen], score


def _calibration(folder: Path) -> list[str]:
    path = folder / "calibration.json"
    if not path.is_file():
        return []
    expected = "the calibration of an evaluation"
    top = read_json(path, expected).get("top_label")
    try:
        svg = plots.reliability(top["confidence"], top["accuracy"], top["pixels"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}), expected {expected}") from None
    return [_image(svg, "Reliability diagram of the network")]


def _times(folder: Path) -> list[str]:
    path = folder / "timing.json"
    if not path.is_file():
        return []
    timing = read_times(path)
    steps = {"forward pass": timing["milliseconds_per_image"]["forward"], **timing["decision_milliseconds_per_image"]}
    return [_image(plots.bars(steps), "Milliseconds of network and rules")]


def _curves(path: Path) -> list[str]:
    """A run's log -> its loss, and its validations where there are several."""
    losses, scores = read_log(path)
    parts = []
    if losses:
        svg = plots.curves({"loss": sorted(losses.items())}, "training loss")
        parts.append(_image(svg, "Training loss"))
    if any(len(points) > 1 for points in scores.values()):
        series = {rule: sorted(points.items()) for rule, points in scores.items()}
        parts.append(_image(plots.curves(series, "mIoUI in training"), "Validation scores by iteration"))
    return parts


def read_log(path: Path) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """log.jsonl -> losses by iteration, and by rule the mIoUI of the validations; of an iteration twice the last."""
    losses: dict[int, float] = {}
    scores: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if not isinstance(row, dict) or "iteration" not in row:
            continue
        if row.get("train/loss") is not None:
            losses[row["iteration"]] = row["train/loss"]
        for rule in SHOWN_RULES:
            if row.get(f"val/{rule}/mIoUI") is not None:
                scores.setdefault(rule, {})[row["iteration"]] = row[f"val/{rule}/mIoUI"]
    return losses, scores


def _gallery(folder: Path) -> str:
    """The panels of --save_pred, smaller."""
    parts = []
    for kind, title in KINDS.items():
        for path in sorted((folder / kind).glob("*.png")):
            parts.append(_image(_small_panel(path), f"{path.stem}, {title}", "jpeg"))
    return f'<div class="gallery">{"".join(parts)}</div>' if parts else ""


def _small_panel(path: Path) -> bytes:
    with open_image(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((PANEL_WIDTH, 4 * PANEL_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _image(data: bytes, alt: str, kind: str = "svg+xml", wide: bool = False) -> str:
    encoded = base64.b64encode(data).decode()
    image = f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}">'
    figure = '<figure class="wide">' if wide else "<figure>"
    return f"{figure}{image}<figcaption>{escape(alt)}</figcaption></figure>"
