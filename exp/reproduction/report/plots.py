"""Plots of an evaluation as SVG, for print and for colour-blind readers: Okabe and Ito's colours, markers, dashes."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito, 2008.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
MANY = 2000  # dots; as a picture within the SVG, which one path per dot would bloat
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


def reliability(confidence: Sequence[float | None], accuracy: Sequence[float | None], pixels: Sequence[int]) -> bytes:
    """Mean confidence, accuracy and pixels of the bins (None without pixels) -> the reliability diagram."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw()
        rows = [(c, a, n) for c, a, n in zip(confidence, accuracy, pixels) if c is not None and a is not None]
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        sizes = [10 + 190 * n / max(n for *_, n in rows) for *_, n in rows] if rows else []
        axes.scatter([c for c, *_ in rows], [a for _, a, _ in rows], s=sizes, color=BLUE, alpha=0.8)
        axes.plot([c for c, *_ in rows], [a for _, a, _ in rows], color=BLUE, linewidth=1)
        axes.set_xlabel("confidence of the top label (area: pixels)")
        axes.set_ylabel("accuracy")
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
