"""Figures of the study: means over users and seeds, and paired differences to the reference."""

from typing import Any

import torch
from torch import Tensor

from laser_fast.config import LaserConfig
from laser_fast.evaluation.metrics import aligned, rank_values
from laser_fast.runs.run_directory import describe_environment
from studying.runs import METRIC, WHOLE
from studying.variants import CACHED, REFERENCE, VARIANTS


def report_of(config: LaserConfig, results: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything as plain numbers."""
    lines = {name: _figures([entry]) for name, entry in results["lines"].items()}
    variants: dict[str, Any] = {}
    for name, runs in results.items():
        if name == "lines":
            continue
        kinds = [kind for kind in runs[0] if kind != "seconds"]
        variants[name] = {
            "question": VARIANTS[name].question,
            "settings": VARIANTS[name].settings,
            "seconds": [run["seconds"]["value"] for run in runs],
            "systems": {kind: _figures([run[kind] for run in runs]) for kind in kinds},
            "differences": {
                other: {
                    kind: _difference([run[kind] for run in runs], [run[kind] for run in results[other]])
                    for kind in kinds
                    if kind in results[other][0]
                }
                for other in dict.fromkeys((REFERENCE, CACHED, VARIANTS[name].against))
                if other in results and other != name
            },
        }
    return {
        "command": command,
        "environment": describe_environment(),
        "config": config.model_dump(mode="json"),
        "lines": lines,
        "variants": variants,
    }


def _values(entry: dict[str, Any], metric: str) -> Tensor:
    """The metric of every row [B]; over draws of candidates their mean."""
    ranks = torch.tensor(entry["ranks"])
    values = rank_values(ranks.flatten(), metric).reshape(ranks.shape)
    return values if values.dim() == 1 else values.mean(dim=1)


def _metrics(entry: dict[str, Any]) -> tuple[str, ...]:
    sampled = torch.tensor(entry["ranks"]).dim() == 2
    return ("HR@1",) if sampled else ("HR@10", METRIC)


def _mean(values: Tensor) -> dict[str, float]:
    """Mean over rows with its standard error."""
    return {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def _figures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one system, its seeds averaged row by row; the deviation is that of the seeds' means."""
    figures: dict[str, Any] = {}
    for metric in _metrics(entries[0]):
        rows = torch.stack([_values(entry, metric) for entry in entries])
        deviation = float(rows.mean(dim=1).std()) if len(rows) > 1 else None
        figures[metric] = _mean(rows.mean(dim=0)) | {"deviation": deviation, "seeds": rows.mean(dim=1).tolist()}
    valid = [entry["valid"] for entry in entries if entry["valid"] is not None]
    return figures | {"valid": sum(valid) / len(valid) if valid else None}


def _difference(entries: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired over rows, the seeds that both have averaged first."""
    both = min(len(entries), len(others))
    return {
        metric: _mean(
            torch.stack([_values(entry, metric) for entry in entries[:both]]).mean(dim=0)
            - torch.stack([_values(entry, metric) for entry in others[:both]]).mean(dim=0)
        )
        for metric in _metrics(entries[0])
    }


def summary(report: dict[str, Any], *, by_question: bool = False) -> str:
    """The table as aligned text: a line for every system, or for every question."""
    return aligned(_questions(report) if by_question else _table(report))


def markdown(report: dict[str, Any], *, by_question: bool = False) -> str:
    """The same table for a page."""
    head, *rows = _questions(report) if by_question else _table(report)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(report: dict[str, Any]) -> list[list[str]]:
    """A head, then validation, metrics with standard errors and differences of every system."""
    rows = [["system", "validation", "figure ± standard error", f"minus {REFERENCE}", f"minus {CACHED}", "seeds"]]
    for name, figures in report["lines"].items():
        rows.append([name, _number(figures["valid"]), _shown(figures), "", "", ""])
    for name, variant in report["variants"].items():
        for kind, figures in variant["systems"].items():
            differences = [_signed(variant["differences"].get(other, {}).get(kind)) for other in (REFERENCE, CACHED)]
            label = f"{name}{', ' * bool(kind)}{kind}"
            seeds = str(len(variant["seconds"]))
            rows.append([label, _number(figures["valid"]), _shown(figures), *differences, seeds])
    return rows


def _questions(report: dict[str, Any]) -> list[list[str]]:
    """A head, then for every variant its means and how far they are from those of the variant it asks about."""
    kinds = [
        kind for kind in ("cosine only", "", WHOLE) if all(kind in v["systems"] for v in report["variants"].values())
    ]
    named = [kind or "calibrated" for kind in kinds]
    rows = [["variant", "question", "seeds", *named, "against", *(f"{name}, difference" for name in named)]]
    for name, variant in report["variants"].items():
        means = [f"{_main(variant['systems'][kind])['mean']:.4f}" for kind in kinds]
        found = variant["differences"].get(VARIANTS[name].against)
        against = "" if found is None else VARIANTS[name].against
        differences = ["" if found is None else _signed(found[kind]) for kind in kinds]
        rows.append([name, variant["question"], str(len(variant["seconds"])), *means, against, *differences])
    return rows


def _main(figures: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = figures.get(METRIC) or figures["HR@1"]
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{metric} {value['mean']:.4f} ± {value['standard_error']:.4f}"
        for metric, value in figures.items()
        if metric != "valid"
    )


def _signed(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    value = _main(difference)
    return f"{value['mean']:+.4f} ± {value['standard_error']:.4f}"
