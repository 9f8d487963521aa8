"""The plots of a report as SVG: large type, colours for the colour-blind, names at the lines they name.

Text becomes outlines, so that a picture looks the same everywhere; its bytes depend on the data alone.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import cycle
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np

from laser_fast.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P = ParamSpec("P")
Names = Sequence[str]
Values = Sequence[float]

# Okabe and Ito (2008), without yellow, which is hard to see on white
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8A5A00")
_GREY, _BLACK = "#6B7278", "#1A1A1A"
_LEVEL: Any = {"color": _BLACK, "linewidth": 1.3, "linestyle": (0, (5, 3))}
_WIDTH, _HEIGHT = 5.2, 3.4  # inches; with type of 11.5 points readable on a phone and in two columns on paper
_LINE_OF_TYPE = 0.085  # of the height of a plot
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A949C",
    "axes.grid": True,
    "grid.color": "#E6E9EC",
    "axes.axisbelow": True,
    "text.parse_math": False,  # names come from data, where a dollar is a dollar
    "svg.fonttype": "path",
    "svg.hashsalt": "laser_fast",
}


@dataclass(frozen=True)
class Line:
    """A curve with its name at its end, and the same on validation as a dashed one."""

    name: str
    x: Values
    y: Values
    validation: Values | None = None


def _as_svg(draw: Callable[Concatenate["Axes", P], None]) -> Callable[P, bytes]:
    """Let `draw` take the axes of a new figure and return the figure."""

    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> bytes:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
            FigureCanvasAgg(figure)  # measures text without a display
            draw(figure.add_subplot(), *arguments, **options)
            target = io.BytesIO()
            figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        return target.getvalue()

    return drawn


@_as_svg
def curves(axes: "Axes", lines: Sequence[Line], x_label: str, y_label: str) -> None:
    """Lines over training steps."""
    from matplotlib.ticker import MaxNLocator

    ends = []
    for color, line in zip(cycle(_COLORS), lines, strict=False):
        axes.plot(line.x, line.y, color=color, marker="o", markersize=5, linewidth=2)
        if line.validation is not None:
            axes.plot(line.x, line.validation, color=color, marker="s", markersize=4, linewidth=1.5, linestyle="--")
        ends.append((line.name, line.y[-1], color))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, max((max(line.x) for line in lines), default=1) * 1.03)
    _label_ends(axes, ends)


@_as_svg
def over_epochs(
    axes: "Axes",
    labels: Names,
    lines: Sequence[tuple[str, Values]],
    y_label: str,
    *,
    level: tuple[float, str] | None = None,
    marked: int | None = None,
) -> None:
    """Values per epoch; of more lines than colours only the highest and lowest are named.

    Args:
        labels: short names of the epochs.
        lines: name ("": none is written) and value of each epoch.
        level: a dashed line to compare with, and its name.
        marked: epoch whose value is ringed as the kept one.
    """
    last = [values[-1] for _, values in lines]
    named = {int(np.argmax(last)), int(np.argmin(last))} if len(lines) > len(_COLORS) else set(range(len(lines)))
    ends = []
    for position, (name, values) in enumerate(lines):
        color, alpha = (_COLORS[position % len(_COLORS)], 1.0) if position in named else (_GREY, 0.35)
        axes.plot(np.arange(len(labels)), values, color=color, marker="o", markersize=5, linewidth=2, alpha=alpha)
        if name and position in named:
            ends.append((name, values[-1], color))
    if level is not None:
        axes.axhline(level[0], **_LEVEL)
        ends.append((level[1], level[0], _BLACK))
    if marked is not None:
        _ring(axes, marked, lines[0][1][marked])
    _epoch_axis(axes, labels)
    axes.set_ylabel(y_label)
    _label_ends(axes, ends)


@_as_svg
def bars(axes: "Axes", labels: Names, values: Values, y_label: str) -> None:
    """One bar per epoch."""
    axes.bar(np.arange(len(labels)), values, color=_COLORS[0], width=0.6)
    axes.grid(visible=False, axis="x")
    _epoch_axis(axes, labels)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_formatter("{x:,.0f}")


@_as_svg
def paired_bars(
    axes: "Axes", labels: Names, series: Sequence[tuple[str, Values]], x_label: str, level: tuple[float, str]
) -> None:
    """Horizontal bars of shares, one of each series for every label, and a named line to compare with."""
    _resize(axes, max(_HEIGHT, 1.4 + 0.55 * len(labels)))
    y, height = np.arange(len(labels), dtype=float), 0.8 / len(series)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 10, "zorder": 4, "bbox": box}
    for position, (name, values) in enumerate(series):
        places = y + (position - (len(series) - 1) / 2) * height
        axes.barh(places, np.multiply(values, 100), height * 0.92, color=_COLORS[position], label=name)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.0%}", (value * 100, place), (4, 0), **style)
    axes.axvline(level[0] * 100, label=level[1], **_LEVEL)
    axes.set_yticks(y, _names(labels))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(x_label)
    _legend_above(axes)


@_as_svg
def dots(axes: "Axes", labels: Names, series: Sequence[tuple[str, Values, Values]], x_label: str) -> None:
    """Means with intervals, one below the other: name, means and half widths of each series."""
    _resize(axes, 1.5 + 0.52 * len(labels))
    y = np.arange(len(labels), dtype=float)
    lowest = 0.0
    for position, (name, means, widths) in enumerate(series):
        offset, halves = (position - (len(series) - 1) / 2) * 0.28, np.nan_to_num(widths)
        style: Any = {"fmt": "os"[position % 2], "markersize": 6, "elinewidth": 2, "capsize": 0}
        axes.errorbar(means, y + offset, xerr=halves, color=_COLORS[position], label=name, **style)
        lowest = float(np.nanmin(means - halves, initial=lowest))
    axes.set_yticks(y, _names(labels))
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]) if lowest < 0 else 0.0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x_label)
    _legend_above(axes)


@_as_svg
def ratios(axes: "Axes", rows: Names, columns: Names, values: np.ndarray, clear: np.ndarray, x_label: str) -> None:
    """A table [rows, columns] of ratios to the average: blue below 1, orange above, white where not `clear` (bool)."""
    _resize(axes, 0.8 + 0.3 * len(rows), max(_WIDTH, 2.2 + 0.5 * len(columns)))
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("ratio", ["#5AA4D6", "#FFFFFF", "#F0A15E"])
    shown = np.where(clear & (values > 0), np.log2(np.maximum(values, 0.25)), np.where(clear, -2.0, 0.0))
    axes.imshow(np.clip(shown, -1.5, 1.5), cmap=colors, vmin=-1.5, vmax=1.5, aspect="auto")
    for row, column in np.ndindex(values.shape):
        weight, color = ("bold", _BLACK) if clear[row, column] else ("normal", _GREY)
        text = f"{values[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=10, color=color, weight=weight)
    axes.set_yticks(np.arange(len(rows)), _names(rows))
    axes.set_xticks(np.arange(len(columns)), columns)
    axes.set_xlabel(x_label)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _names(labels: Names) -> list[str]:
    """Labels from data: a picture that holds a control character is no XML and is not shown."""
    return [printable(label, lines=True) for label in labels]


def _resize(axes: "Axes", height: float, width: float = _WIDTH) -> None:
    figure: Any = axes.figure
    figure.set_size_inches(width, height)


def _epoch_axis(axes: "Axes", labels: Names) -> None:
    every = -(-len(labels) // 12)
    axes.set_xticks(range(0, len(labels), every), _names(labels[::every]))
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.set_xlabel("epoch")


def _ring(axes: "Axes", x: int, y: float) -> None:
    color = _COLORS[1]
    axes.plot([x], [y], marker="o", markersize=14, markerfacecolor="none", markeredgecolor=color, markeredgewidth=2)
    axes.margins(y=0.25)
    side, shift = ("right", -12) if x > axes.get_xlim()[1] / 2 else ("left", 12)
    axes.annotate("kept", (x, y), (shift, 10), textcoords="offset points", ha=side, color=color, weight="bold")


def _legend_above(axes: "Axes") -> None:
    handles, names = axes.get_legend_handles_labels()
    entries = sorted(zip(handles, names, strict=True), key=lambda entry: "balanced" in entry[1])  # lines come first
    style: Any = {"loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 10}
    axes.figure.legend(*zip(*entries, strict=True), handlelength=1.2, columnspacing=1.0, **style)


def spread(heights: Values, gap: float) -> list[float]:
    """Rising heights moved as little as it takes to be `gap` apart: upwards, and back from the top, which is 1."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    ceiling = 1.0
    for position in reversed(range(len(places))):
        places[position] = min(places[position], ceiling)
        ceiling = places[position] - gap
    return places


def _label_ends(axes: "Axes", ends: Sequence[tuple[str, float, str]]) -> None:
    """Write names right of the plot, apart from each other: (name, height, colour) of their lines."""
    finite = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    if not finite:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    style: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    places = spread([(height - low) / (high - low) for _, height, _ in finite], _LINE_OF_TYPE)
    for (name, _, color), place in zip(finite, places, strict=True):
        axes.annotate(printable(name, lines=True), (1.0, place), (6, 0), color=color, **style)
