"""The lines beside Laser may add what Laser's own score could add, and nothing else."""

from typing import Any

import pytest
import torch

from laser_fast.config import EvaluationConfig, LaserConfig, build_config
from laser_fast.evaluation import comparison
from laser_fast.evaluation.comparison import compare
from laser_fast.laser.build import build_laser, load_inputs, load_language_model, training_counts
from laser_fast.recommenders.item_to_item import ItemKNN, SequentialRules


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {"rules", "neighbors"}),
        ({"sequential_rules": False}, {"neighbors"}),
        ({"neighbors": False}, {"rules"}),
        ({"neighbors": False, "sequential_rules": False}, set()),
        ({"calibrate": False}, set()),
    ],
    ids=["all", "no-rules", "no-neighbors", "neither", "not-calibrated"],
)
def test_every_fused_line_has_the_tables_that_laser_could_have(
    tiny_settings: dict[str, Any], switches: dict[str, bool], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(LaserConfig, tiny_settings)
    inputs = load_inputs(config)
    model = build_laser(config, inputs, *load_language_model(config.lm)).eval()
    model.refresh_items()
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    tables = inputs.tables(EvaluationConfig(**switches))
    assert {name: type(table) for name, table in tables.items()} == {
        name: kind for name, kind in (("rules", SequentialRules), ("neighbors", ItemKNN)) if name in expected
    }
    fitted: list[tuple[set[str], set[str]]] = []
    fit = comparison.fit_calibration

    def watching(components: Any, rows: Any, counts: Any, **options: Any) -> Any:
        used = {name for name in components if components[name] in tables.values()}
        assert all(components[name] is tables[name] for name in used)
        fitted.append((set(components), set(options["standardize"])))
        return fit(components, rows, counts, **options)

    monkeypatch.setattr(comparison, "fit_calibration", watching)
    found = compare(model, inputs.split, counts, inputs.recommender, tables=tables, cached=model)
    assert fitted == [
        ({"recommender"}, {"recommender"}),
        ({"text_last"}, {"text_last"}),
        (fusion := {"text_last", "text_history", "recommender"} | expected, fusion - expected),
        ({"cached", "recommender"} | expected, {"cached", "recommender"}),
    ]
    assert list(found.metrics)[-1] == "Laser"
