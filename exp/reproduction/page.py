"""The report as one self-contained HTML page: no script, nothing from elsewhere, everything from files escaped."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from exp.durable import write_atomically
from exp.metrics import EvalResult, image_scores
from exp.reproduction import figures
from exp.reproduction.measured import Measured, Training
from exp.reproduction.published import Table, load_tables
from exp.reproduction.report import (
    HEADER,
    Row,
    csv_text,
    latex,
    markdown,
    other_trainings,
    row_cells,
    seed_table,
    table_rows,
    training_table,
)
from exp.results import IMAGES, load_entropy
from exp.text_files import read_json

STYLES = Path(__file__).with_name("page.css")
PANEL_WIDTH = 720  # pixels
SHOWN_RULES = ("argmax", "rankseg_rma")  # of the validations in training
KINDS = {"gain": "largest gain", "loss": "largest loss", "random": "at random"}


def write_report(output: Path) -> Path:
    """Write <output>/report/tables.{md,tex,csv} and index.html from the results below `output` -> the folder."""
    measured = Measured(output)
    tables = {name: (table, table_rows(table, measured)) for name, table in load_tables().items()}
    others = other_trainings(measured)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tables.md", markdown(tables, others))
    write_atomically(folder / "tables.tex", latex(tables))
    write_atomically(folder / "tables.csv", csv_text(tables))
    write_atomically(folder / "index.html", build_page(tables, others))
    return folder


def build_page(tables: dict[str, tuple[Table, list[Row]]], others: Sequence[Training]) -> str:
    """Published tables with their rows, and trainings of their own -> HTML."""
    seeded = [group for group in group_seeds(others) if len(group) > 1 and len(group[0].results) > 1]
    sections = [(f"training-{i}", _title(t), _training(t)) for i, t in enumerate(others)]
    sections += [(f"seeds-{i}", f"{g[0].name}: {len(g)} seeds", _table(*seed_table(g))) for i, g in enumerate(seeded)]
    sections += [
        (name, f"{name}: {table.title}", _published(name, table, rows)) for name, (table, rows) in tables.items()
    ]
    contents = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>' for key, title, content in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>RankSEG-RMA: published and measured</title><style>{STYLES.read_text(encoding='utf-8')}</style></head>"
        "<body><header><h1>RankSEG-RMA: published and measured</h1><p>Scores in percent; gains in percent points with "
        "95 % bootstrap intervals over images, or over cases where images are slices of volumes.</p></header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav><main>{body}</main></body></html>\n'
    )


def group_seeds(trainings: Iterable[Training]) -> list[list[Training]]:
    """Trainings that differ in their seed alone, together."""
    groups: dict[tuple, list[Training]] = {}
    for training in trainings:
        groups.setdefault(training.unseeded, []).append(training)
    return list(groups.values())


def _title(training: Training) -> str:
    return f"{training.name}, seed {training.config['seed']}"


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _html_table(header, [[escape(cell) for cell in row] for row in rows])


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _training(training: Training) -> str:
    parts = [_table(*training_table(training))]
    if len(training.results) > 1:
        parts.append(_comparisons(training))
    run = training.folder.parent
    plots = [*_calibration(training.folder), *_times(training.folder), *_curves(run / "log.jsonl")]
    parts.append(f'<div class="plots">{"".join(plots)}</div>' if plots else "")
    return "".join([*parts, _gallery(run / "pictures")])


def _comparisons(training: Training) -> str:
    base, other = training.results[:2]
    rule, metric = other.rule, training.metric
    first, second = (image_scores(result.counts)[metric] for result in (base, other))
    both = ~(np.isnan(first) | np.isnan(second))
    gains, sizes = (second - first)[both], object_size(base)[both]
    label = "mean share of the image of an object's class, %"
    plots = [
        (figures.scatter_scores(first[both], second[both], rule, metric), f"{metric} of each image under both rules"),
        (figures.histogram_gains(gains, rule, metric), f"Gains of {rule}"),
        (figures.gains_by(gains, sizes, label, rule, metric), f"Gain of {rule} against the size of objects"),
    ]
    entropy, note = _entropy(training.folder / IMAGES, base), ""
    if entropy is not None:
        known = both & ~np.isnan(entropy)
        svg = figures.gains_by((second - first)[known], entropy[known], "mean entropy of the image, nats", rule, metric)
        plots.append((svg, f"Gain of {rule} against the network's uncertainty"))
    else:
        note = "<p>Gain against the network's uncertainty: these results came without the entropy of the images.</p>"
    return f'<div class="plots">{"".join(_image(svg, alt) for svg, alt in plots)}</div>{note}'


def _entropy(path: Path, result: EvalResult) -> np.ndarray | None:
    """(N,) the mean entropy of the images, NaN where one has none; None without a file of the same images."""
    if not path.is_file():
        return None
    by_name = load_entropy(path)
    values = np.array([by_name.get(name, np.nan) for name in result.names])
    return None if np.isnan(values).all() else values


def object_size(result: EvalResult) -> np.ndarray:
    """(N,) the mean share of an image's counted pixels, in percent, that a class in its label has; the first class, the
    background of most data sets, is left out where others are there."""
    sizes = (result.counts[:, 0] + result.counts[:, 2]).astype(float)  # TP + FN
    total = np.maximum(sizes.sum(1), 1)
    objects = sizes[:, 1:]
    present = np.maximum((objects > 0).sum(1), 1)
    return 100 * objects.sum(1) / present / total


def _calibration(folder: Path) -> list[str]:
    path = folder / "calibration.json"
    if not path.is_file():
        return []
    top = read_json(path, "the calibration of an evaluation")["top_label"]
    svg = figures.reliability(top["confidence"], top["accuracy"], top["pixels"])
    return [_image(svg, "Reliability diagram of the network")]


def _times(folder: Path) -> list[str]:
    path = folder / "timing.json"
    if not path.is_file():
        return []
    timing = read_json(path, "the times of an evaluation")
    steps = {"forward pass": timing["milliseconds_per_image"]["forward"], **timing["decision_milliseconds_per_image"]}
    return [_image(figures.bars(steps), "Milliseconds of network and rules")]


def _curves(path: Path) -> list[str]:
    """A run's log -> its loss, and its validations where there are several."""
    losses, scores = read_log(path)
    parts = []
    if losses:
        svg = figures.curves({"loss": sorted(losses.items())}, "training loss")
        parts.append(_image(svg, "Training loss"))
    if any(len(points) > 1 for points in scores.values()):
        series = {rule: sorted(points.items()) for rule, points in scores.items()}
        parts.append(_image(figures.curves(series, "mIoUI in training"), "Validation scores by iteration"))
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
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((PANEL_WIDTH, 4 * PANEL_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _image(data: bytes, alt: str, kind: str = "svg+xml") -> str:
    encoded = base64.b64encode(data).decode()
    image = f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{escape(alt)}</figcaption></figure>"
