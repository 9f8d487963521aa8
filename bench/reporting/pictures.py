"""The pictures of a report: shares of the roofs, the waterfall, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting.document import rows_of, step_name
from reporting.tables import GIB, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEASURED, _PREDICTED, _ROOF = "#2f6f9f", "#e0a458", "#8c1c13"
_ROW_INCHES, _FRAME_INCHES = 0.27, 1.5
_LABEL_LENGTH = 52
_LARGEST_TOKENS = 24_000  # up to which a plan is drawn
_MIB = 2**20
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw(report: Mapping[str, Any], out: Path) -> list[str]:
    """Draw what there are measurements for; the names of the files.

    A missing matplotlib leaves the report without pictures.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    sections = {name: found for name, found in report["sections"].items() if found["status"] == "measured"}
    drawn = {"roofline.png": _roofline, "waterfall.png": _waterfall, "memory.png": _memory}
    figures = {name: figure for name, draw_one in drawn.items() if (figure := draw_one(sections)) is not None}
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=100)
    return list(figures)


def _new(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _short(text: str) -> str:
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"


def _roofline(sections: Mapping[str, Any]) -> Figure | None:
    """Bars against the roof: kernels against copying or products, steps against the FLOP floor."""
    kernels = [
        (_short(row["name"].replace("forward+backward", "both")), row["share_of_limit"])
        for row in rows_of(sections, "kernels")
        if row.get("share_of_limit") is not None
    ]
    steps = [
        (_short(step_name(row)), row["share_of_floor"]) for row in rows_of(sections, "step") if "share_of_floor" in row
    ]
    panels = [
        ("Single operations", "share of the measured roof [%]", kernels),
        ("Step of the frozen model", "share of the FLOP floor [%]", steps),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    longest = max(len(bars) for *_, bars in panels)
    figure, axes = _new(len(panels), 7.0 * len(panels), _FRAME_INCHES + _ROW_INCHES * longest)
    for ax, (title, label, bars) in zip(axes, panels, strict=True):
        shares = [100 * share for _, share in bars]
        places = range(len(bars))
        ax.barh(places, shares, color=_MEASURED)
        ax.set_yticks(places, [name for name, _ in bars], fontsize=8)
        ax.invert_yaxis()
        ax.axvline(100, color=_ROOF, linewidth=1.5, label="measured roof")
        room = max(100.0, *shares)
        for place, share in zip(places, shares, strict=True):
            text = f"{share:.0f}" if share >= 9.95 else f"{share:.1f}"
            ax.text(share + 0.01 * room, place, text, va="center", fontsize=8, bbox=_ON_WHITE)
        ax.set_xlim(0, 1.12 * room)
        ax.set_xlabel(label)
        ax.set_title(title)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16 if longest < 8 else -0.1), frameon=False)
    return figure


def _waterfall(sections: Mapping[str, Any]) -> Figure | None:
    """Time of every state as a share of the first, measured beside predicted."""
    rows = [row for row in rows_of(sections, "waterfall", "cumulative") if row.get("cumulative_gain")]
    if not rows:
        return None
    found = sections["waterfall"]
    figure, (ax,) = _new(1, 10.0, 1.6 + 0.55 * len(rows))
    measured = [100 / row["cumulative_gain"] for row in rows]
    predicted = [100 / row["predicted_cumulative_gain"] for row in rows]
    _bars_in_pairs(ax, measured, predicted, "measured here", "predicted (8B in 4 bits on an H100)")
    for place, (row, share, other) in enumerate(zip(rows, measured, predicted, strict=True)):
        text = f"{share:.0f}%   {plain(row['us_per_token'])} us/token"
        ax.text(share + 1, place - 0.2, text, va="center", fontsize=8)
        ax.text(other + 1, place + 0.2, f"{other:.0f}%", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [row["name"] if not n else f"+ {row['name']}" for n, row in enumerate(rows)])
    ax.set_xlim(0, 1.35 * max(100.0, *measured))
    ax.set_xlabel("time per useful token, of the first form's [%]")
    ax.set_title(f"{found['shape']} in {found['weights']}, {found['tokens']} useful tokens")
    ax.legend(loc="lower right")
    return figure


def _bars_in_pairs(ax: Axes, first: Sequence[float], second: Sequence[float], *labels: str) -> None:
    """Two bars a row, from the top down."""
    for offset, values, color, label in zip((-0.2, 0.2), (first, second), (_MEASURED, _PREDICTED), labels, strict=True):
        ax.barh([place + offset for place in range(len(values))], values, height=0.38, color=color, label=label)
    ax.invert_yaxis()


def _memory(sections: Mapping[str, Any]) -> Figure | None:
    """Left: peak of a step, planned beside measured. Right: the plan for a large model against the sizes of cards."""
    rows = [row for row in rows_of(sections, "step") if "step_bytes" in row]
    cards = sections.get("cards")
    if not rows and cards is None:
        return None
    panels = bool(rows) + (cards is not None)
    figure, axes = _new(panels, 7.5 * panels, max(5.0, _FRAME_INCHES + 1.5 * _ROW_INCHES * len(rows)))
    if rows:
        _planned_and_measured(axes[0], rows)
    if cards is not None:
        _cards(axes[-1], cards)
    return figure


def _planned_and_measured(ax: Axes, rows: list[dict[str, Any]]) -> None:
    unit, name = (GIB, "GiB") if max(row["step_bytes"] for row in rows) > GIB else (_MIB, "MiB")
    measured, planned = ([row[key] / unit for row in rows] for key in ("step_bytes", "planned_step_bytes"))
    _bars_in_pairs(ax, measured, planned, "measured", "planned")
    ax.set_yticks(range(len(rows)), [_short(step_name(row)) for row in rows], fontsize=8)
    ax.set_xlabel(f"peak of one step beside the weights [{name}]")
    ax.set_title("Step of the frozen model")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)


def _cards(ax: Axes, cards: Mapping[str, Any]) -> None:
    for mode, line in cards["modes"].items():
        ends = (0, _LARGEST_TOKENS)
        ax.plot(
            [tokens / 1000 for tokens in ends],
            [(line["base_bytes"] + line["bytes_per_token"] * tokens) / GIB for tokens in ends],
            label=f"planned: {mode}",
        )
    for row in cards["cards"]:
        size = row["bytes"] / GIB
        ax.axhline(size, color="#999999", linewidth=0.8, linestyle="--")
        ax.annotate(row["card"], (1.01, size), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        measured = row.get("measured")
        if measured is not None and measured["fits"]:
            context = cards["fixed_bytes"]["CUDA context"]
            reserved = (measured["reserved_bytes"] + context) / GIB
            ax.plot(measured["tokens"] / 1000, reserved, "o", color=_ROOF)
            ax.annotate("measured", (measured["tokens"] / 1000, reserved), xytext=(5, -10), textcoords="offset points")
    ax.set_xlim(0, _LARGEST_TOKENS / 1000)
    ax.set_ylim(0, 1.1 * max(row["bytes"] for row in cards["cards"]) / GIB)
    ax.set_xlabel("packed tokens of a micro-batch [thousands]")
    ax.set_ylabel("memory of the whole run [GiB]")
    ax.set_title(f"Training with {cards['shape']} in {cards['weights']}")
    ax.legend(loc="lower right")
