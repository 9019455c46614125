"""Plots of an evaluation as SVG, for print and for colour-blind readers: Okabe and Ito's colours, markers, dashes."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito, 2008.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
MANY = 2000  # dots; as a picture within the SVG, which one path per dot would bloat
NAMED = 30  # classes, up to which a confusion matrix has names and numbers
SERIES = ((BLUE, "o", "-"), (ORANGE, "s", "--"))
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "report",
         "svg.fonttype": "path"}  # fmt: skip


def _draw(width: float = 3.6, height: float = 3.0) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> bytes:
    """A figure -> SVG, the same bytes for the same plot."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def scatter_scores(base: np.ndarray, other: np.ndarray, rule: str, metric: str) -> bytes:
    """(N,) scores of the images under argmax and under another rule, in percent -> one dot per image."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw()
        low, high = min(base.min(), other.min()), max(base.max(), other.max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=1)
        axes.scatter(base, other, s=12, color=BLUE, linewidths=0, alpha=0.7, rasterized=len(base) > MANY)
        axes.set_xlabel(f"{metric} per image, argmax")
        axes.set_ylabel(f"{metric}, {rule}")
        return _svg(figure)


def histogram_gains(gains: np.ndarray, rule: str, metric: str) -> bytes:
    """(N,) differences rule - argmax in percent points -> their histogram."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw()
        axes.hist(gains, bins=30, color=BLUE, edgecolor="white", linewidth=0.5)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.axvline(gains.mean(), color=ORANGE, linestyle="--", label=f"mean {gains.mean():+.2f}")
        axes.set_xlabel(f"{metric}, {rule} - argmax")
        axes.set_ylabel("images")
        axes.legend(frameon=False)
        return _svg(figure)


def gains(rows: Mapping[str, Mapping[str, tuple[float, float]]], metric: str) -> bytes:
    """By network and rule the difference from argmax in percent points and half of its interval -> dots with bars."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw(7.2, 0.7 + 0.36 * len(rows))
        rules = dict.fromkeys(rule for row in rows.values() for rule in row)
        for place, (rule, colour, (_, marker, _)) in enumerate(zip(rules, (ORANGE, BLUE), SERIES[::-1])):
            values = [row[rule] for row in rows.values()]
            at = np.arange(len(rows)) + 0.24 * (place - (len(rules) - 1) / 2)
            mean, half = np.array(values).T
            axes.errorbar(mean, at, xerr=half, fmt=marker, color=colour, markersize=4, linewidth=1.2, label=rule)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel(f"{metric} - that of argmax, points")
        axes.legend(frameon=False)
        return _svg(figure)


def reliability(series: Mapping[str, Mapping[str, Sequence]]) -> bytes:
    """By name the pixels, mean confidence and accuracy of the bins (None without pixels) -> the reliability diagram."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        for (name, bins), (colour, marker, dash) in zip(series.items(), SERIES):
            columns = zip(bins["confidence"], bins["accuracy"], bins["pixels"])
            rows = [(c, a, n) for c, a, n in columns if c is not None and a is not None]
            sizes = [10 + 190 * n / max(n for *_, n in rows) for *_, n in rows]
            confidence, accuracy = [c for c, *_ in rows], [a for _, a, _ in rows]
            axes.scatter(confidence, accuracy, s=sizes, color=colour, marker=marker, alpha=0.8)
            axes.plot(confidence, accuracy, color=colour, linestyle=dash, linewidth=1, label=name)
        axes.set_xlabel("confidence of the top label (area: pixels)")
        axes.set_ylabel("accuracy")
        if len(series) > 1:
            axes.legend(frameon=False)
        return _svg(figure)


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> bytes:
    """(C, C) pixels by label (rows) and class decided -> percent of each label's pixels, with names for few classes."""
    pixels = matrix.sum(1, keepdims=True)
    percent = 100 * matrix / np.maximum(pixels, 1)
    side = min(1.6 + 0.42 * len(classes), 9.0)
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw(side + 0.6, side)
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        if len(classes) <= NAMED:
            axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
            axes.set_yticks(range(len(classes)), classes, parse_math=False)
            for (row, column), value in np.ndenumerate(percent):
                if value >= 0.5:
                    colour = "white" if value > 55 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xlabel("class decided")
        axes.set_ylabel("class of the label")
        axes.spines[:].set_visible(True)
        figure.colorbar(image, ax=axes, label="% of the label's pixels", shrink=0.7)
        return _svg(figure)


def bars(milliseconds: Mapping[str, float]) -> bytes:
    """Milliseconds per image by what was done -> horizontal bars."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw(4.6, 0.6 + 0.32 * len(milliseconds))
        names = list(milliseconds)[::-1]
        drawn = axes.barh(names, [milliseconds[name] for name in names], color=BLUE)
        axes.bar_label(drawn, fmt="%.1f", padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds per image")
        return _svg(figure)


def curves(series: Mapping[str, Sequence[tuple[int, float]]], label: str) -> bytes:
    """(iteration, value) pairs by name -> lines, told apart by colour, marker and dash."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw()
        for (name, points), (colour, marker, dash) in zip(series.items(), SERIES):
            few = len(points) <= 20
            axes.plot(*zip(*points), color=colour, linestyle=dash, marker=marker if few else None, label=name)
        axes.set_xlabel("iteration")
        axes.set_ylabel(label)
        if len(series) > 1:
            axes.legend(frameon=False)
        return _svg(figure)
