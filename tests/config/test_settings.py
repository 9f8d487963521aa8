"""Settings: typos are refused with a suggestion, values are checked, the file reads back to what was written."""

from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

import laser_fast.config as config_module
from laser_fast.config import (
    LaserConfig,
    RecommenderConfig,
    Settings,
    apply_overrides,
    build_config,
    dump_config,
    load_config,
    resolve_path,
)
from laser_fast.config.settings import RETIRED

MINIMAL: dict[str, Any] = {
    "data": "d",
    "recommender": "r",
    "output": "o",
    "lm": {"path": "lm"},
    "training": {"phase_a": {"epochs": 2}},
}
NO_TERM = "objective.contrastive_weight=0 objective.matching_weight=0 objective.generation_weight=0"


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    config = build_config(LaserConfig, MINIMAL)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(LaserConfig, tmp_path / "config.yaml") == config
    assert "temperature: 0.05" in dump_config(config)  # defaults are shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("trainig={}", r"unknown key 'trainig', did you mean 'training'\?"),
        ("mformer.num_expert=2", r"unknown key 'mformer.num_expert', did you mean 'mformer.num_experts'\?"),
        ("temperature=0.1", r"unknown key 'temperature', did you mean '(objective\.)?temperature'\?"),
        ("mformer.num_experts=0", "mformer.num_experts: .*greater than or equal to 1, got 0"),
        ("mformer.num_experts=2 mformer.top_k=3", "mformer: top_k must be at most num_experts, got 3 and 2"),
        ("mformer.width=10 mformer.num_heads=4", "width must be a multiple of num_heads, got 10 and 4"),
        ("bituning.prefix=soft", "bituning.prefix: .*'mformer', 'linear', 'shared' or 'none', got 'soft'"),
        ("prompt.user_template=films", r"user_template must contain \{history\} once, got 'films'"),
        ("recommender=null", 'recommender must be set when bituning.prefix is "mformer", got None'),
        ("recommender=null bituning.prefix=linear", 'must be set when bituning.prefix is "linear", got None'),
        ("bituning.prefix=none training.pretrain.epochs=1", "training.pretrain.epochs must be 0 .* got 1"),
        (f"{NO_TERM} training.pretrain.epochs=2", "or generation_weight must be above 0 .* got 0 for all and 2 epochs"),
        ("objective.candidates=sampled", 'num_negatives must be at least 1 when candidates is "sampled"'),
        ("lm={}", "key 'lm.path' must be set, got nothing"),
        (f"training.seed={2**63}", "training.seed: .*less than 4294967296"),
        ("training.seed=-1", "training.seed: .*greater than or equal to 0, got -1"),
        ("training.batch_size=yes", "training.batch_size: must not be a truth value, got True"),
        (f"training.phase_a.epochs={10**12}", "training.phase_a.epochs: .*less than or equal to 100000"),
        ("objective.temperature=1.0e+300", "objective.temperature: .*less than or equal to 1000000, got 1e.300"),
        ("objective.temperature=.nan", "objective.temperature: .*finite number, got nan"),
        ("split.valid_from=.inf", r"split.valid_from: must be a number of less than 2\^63, or a date, got inf"),
    ],
)
def test_bad_settings_are_named(changes: str, message: str) -> None:
    values = apply_overrides(deepcopy(MINIMAL), changes.split())
    with pytest.raises(ValueError, match=message):
        build_config(LaserConfig, values)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="dropout: .*; unknown key 'widht'"):
        build_config(RecommenderConfig, {"widht": 3, "dropout": 2.0})
    with pytest.raises(ValueError, match="configuration: settings must be keys and values, got a list"):
        build_config(RecommenderConfig, [1])  # type: ignore[arg-type]


def test_a_setting_of_older_files_has_the_one_value_it_still_has() -> None:
    rate = {"weight_decay": 0.01, "warmup_fraction": 0.05, "max_grad_norm": 1.0, "eight_bit": False}
    stages = {"text_optimizer": rate | {"learning_rate": 2e-3}, "pretrain_optimizer": rate}
    older = {"mformer": {"cross_attention_freq": 2}, "prompt": {"item_prompt": "{text}"}}
    older["training"] = MINIMAL["training"] | stages
    assert build_config(LaserConfig, MINIMAL | older) == build_config(LaserConfig, MINIMAL)
    with pytest.raises(ValueError, match="mformer: cross_attention_freq .* must be 2, got 3; remove it, or use"):
        build_config(LaserConfig, MINIMAL | {"mformer": {"cross_attention_freq": 3}})
    message = "text_optimizer: eight_bit .* False, got True; remove it and set training.optimizer.eight_bit, or use"
    with pytest.raises(ValueError, match=message):
        build_config(LaserConfig, MINIMAL | {"training": {"text_optimizer": {"eight_bit": True}}})
    sections = {kind.__name__: kind for kind in vars(config_module).values() if isinstance(kind, type)}
    for section, name in (key.split(".") for key in RETIRED):
        assert name not in sections[section].model_fields


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("width: 32\nepochs: 5\n", encoding="utf-8")
    config = load_config(RecommenderConfig, path, ["epochs=7", "dropout=0.25"])
    assert (config.width, config.epochs, config.dropout) == (32, 7, 0.25)
    assert load_config(RecommenderConfig, None, ["width=32", "epochs=7", "dropout=0.25"]) == config
    assert apply_overrides({}, ["lm.path=x", "training.pretrain.epochs=0"]) == {
        "lm": {"path": "x"},
        "training": {"pretrain": {"epochs": 0}},
    }


def test_a_section_given_in_part_keeps_the_default_of_its_place() -> None:
    overrides = ["phase_a.rows_per_epoch=4096", "text.epochs=3", "optimizer.weight_decay=0", "pretrain={}"]
    values = apply_overrides({**MINIMAL, "training": {}}, [f"training.{override}" for override in overrides])
    training = build_config(LaserConfig, values).training
    assert (training.phase_a.epochs, training.phase_a.rows_per_epoch) == (1, 4096)
    assert (training.text.epochs, training.text.batch_size) == (3, 256)
    text = training.optimizer_at(training.text_optimizer)
    assert (text.learning_rate, text.weight_decay, training.optimizer.learning_rate) == (2e-3, 0, 1e-3)
    assert training.pretrain.epochs == 0


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("width: -1", [], r"^\S*config\.yaml: width: Input should be greater than .*, got -1$"),
        ("width: 8", ["epochs=1000000000000"], r"yaml with overrides: epochs: Input should be less than .*0{12}"),
        ("width: 8", ["epochs"], "must read section.key=value, got 'epochs'"),
        ("width: 8", ["width.x=1"], "'width' in override 'width.x=1' must be a section, got 8"),
    ],
)
def test_malformed_files_and_overrides(text: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(RecommenderConfig, tmp_path / "config.yaml", overrides)


def numeric_fields() -> list[tuple[type[Settings], str]]:
    """Every setting that may be a number, of every section."""
    found = []
    for section in vars(config_module).values():
        if isinstance(section, type) and issubclass(section, Settings):
            for name, field in section.model_fields.items():
                kinds = {field.annotation, *get_args(field.annotation)}
                if {getattr(kind, "__origin__", kind) for kind in kinds} & {int, float}:
                    found.append((section, name))
    return found


def test_every_number_has_two_bounds() -> None:
    fields = numeric_fields()
    assert len(fields) > 50
    for section, name in fields:
        for value in (10**30, -(10**30), 1e300, -1e300, float("nan"), float("inf"), float("-inf"), True, False):
            with pytest.raises(ValidationError) as caught:
                section.model_validate({name: value})
            refused = {str(problem["loc"][0]) for problem in caught.value.errors() if problem["type"] != "missing"}
            assert name in refused, f"{section.__name__}.{name} takes {value}"


def test_a_message_does_not_grow_with_what_is_wrong() -> None:
    for values, message in (
        ({f"k{number}": 0 for number in range(10**5)}, "and 99,990 more"),
        ({"width": "x" * 10**6}, r"width: .*, got 'x+\.\.\. \(1,000,002 characters\)"),
        ({"w" * 10**6: 1}, "unknown key 'wwww"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build_config(RecommenderConfig, values)
        assert len(str(caught.value)) < 1000


def test_presets_are_valid() -> None:
    folder = resolve_path("package:laser_fast/presets")
    presets = sorted(folder.glob("*.yaml"))
    assert presets
    for preset in presets:
        assert load_config(LaserConfig, preset).training.phase_a.epochs > 0


def test_paths_inside_packages(tmp_path: Path) -> None:
    assert resolve_path(tmp_path) == tmp_path
    assert resolve_path("package:laser_fast/doctor.py").name == "doctor.py"
    for location, kind, message in (
        ("package:no_such_package/x", FileNotFoundError, "package 'no_such_package' must be installed"),
        ("package:laser_fast/nothing", FileNotFoundError, "must contain 'nothing', got nothing there"),
        ("package:a.b/c", ValueError, "must be a top-level module name, got 'a.b'"),
        (tmp_path / "absent", FileNotFoundError, "the path must exist"),
    ):
        with pytest.raises(kind, match=message):
            resolve_path(location)
