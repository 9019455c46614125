"""Plots of an evaluation as SVG, for print and for colour-blind readers: Okabe and Ito's colours, markers, dashes."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito, 2008.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
MANY = 2000  # dots; as a picture within the SVG, which one path per dot would bloat
NAMED = 30  # classes, up to which a confusion matrix has names and numbers
SERIES = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    ("#009E73", "^", "-."),
    ("#000000", "D", ":"),
    ("#CC79A7", "v", (0, (5, 1))),
    ("#E69F00", "P", (0, (3, 1, 1, 1))),
    ("#56B4E9", "X", (0, (1, 1))),
)
COLUMNS = 3  # of panels
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


def scatter_scores(base: np.ndarray, others: Mapping[str, np.ndarray], metric: str, unit: str) -> bytes:
    """(N,) scores under argmax and, by rule, those under it, in percent -> a panel per rule with a dot per unit."""
    columns = min(COLUMNS, len(others))
    rows = -(-len(others) // columns)
    scores = np.stack([base, *others.values()])
    low, high = np.nanmin(scores), np.nanmax(scores)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * columns + 0.4, 2.3 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (rule, values), (colour, *_) in zip(panels.flat, others.items(), cycle(SERIES)):
            axes.plot([low, high], [low, high], color=GREY, linewidth=1)
            axes.scatter(base, values, s=9, color=colour, linewidths=0, alpha=0.6, rasterized=len(base) > MANY)
            axes.set_title(rule, fontsize=9, parse_math=False)
        for axes in panels.flat[len(others) :]:
            axes.set_axis_off()
        figure.supxlabel(f"{metric} of each {unit}, argmax", fontsize=9)
        figure.supylabel(f"{metric} under the rule", fontsize=9)
        return _svg(figure)


def distribute_gains(gains: Mapping[str, np.ndarray], metric: str, unit: str) -> bytes:
    """By rule (N,) differences from argmax in percent points -> the share of units that gain as much or less.

    The axis of the gains is linear up to one point, and logarithmic beyond.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw(5.6, 3.3 + 0.1 * len(gains))
        for (rule, values), (colour, _, dash) in zip(gains.items(), cycle(SERIES)):
            share = 100 * np.arange(1, len(values) + 1) / len(values)
            line = {"color": colour, "linestyle": dash, "linewidth": 1.3, "drawstyle": "steps-post"}
            axes.plot(np.sort(values), share, **line, label=f"{rule}, mean {values.mean():+.2f}")
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xscale("symlog", linthresh=1)
        most = max(1, *(np.abs(values).max() for values in gains.values()))
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= most]
        axes.set_xticks([*(-tick for tick in ticks), 0, *ticks])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{metric} - that of argmax, points")
        axes.set_ylabel(f"% of the {unit}s gain as much or less")
        legend = figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return _svg(figure)


def gains(rows: Mapping[str, Mapping[str, tuple[float, float]]], metric: str) -> bytes:
    """By network and rule the difference from argmax in percent points and half of its interval -> dots with bars."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _draw(7.2, 0.7 + 0.36 * len(rows))
        rules = dict.fromkeys(rule for row in rows.values() for rule in row)
        for place, (rule, colour, (_, marker, _)) in enumerate(zip(rules, (ORANGE, BLUE), SERIES[1::-1])):
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
