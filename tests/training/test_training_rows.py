"""Training reads for each row the states of the fold that has not seen its user; nothing else reads those."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.config import LaserConfig, RecommenderConfig, build_config
from laser_fast.data import EvaluationRows, SequenceDataset, leave_one_out, training_rows
from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.loading import NextItemCollator, NextItemDataset
from laser_fast.laser import LaserModel
from laser_fast.laser.build import load_inputs
from laser_fast.recommenders.packed_recommender import CrossFitted
from laser_fast.recommenders.protocol import FrozenRecommender
from laser_fast.recommenders.recommender_files import load_recommender
from laser_fast.training.loop import StageTrainer
from laser_fast.training.recommender.train_recommender import train_recommender
from laser_fast.training.train import fingerprint, train_laser
from laser_fast.training.training_rows import laser_rows

Same = Callable[[Path, Path], None]
SECTIONS = ("prompt", "mformer", "bituning", "objective", "execution")


@pytest.fixture(scope="module")
def crossed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SASRec with three folds."""
    folder = tmp_path_factory.mktemp("crossed") / "sasrec"
    dataset = SequenceDataset.load(tiny_data)
    config = RecommenderConfig(width=8, num_layers=1, max_length=10, epochs=2, folds=3)
    train_recommender(leave_one_out(dataset), dataset.num_items, config, seed=0, run_dir=folder, progress=False)
    return folder


def config_of(settings: dict[str, Any], recommender: Path, **sections: dict[str, Any]) -> LaserConfig:
    values = {**settings, "recommender": str(recommender)}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_config(LaserConfig, values)


def folds_of(recommender: Path) -> CrossFitted:
    folds = load_recommender(recommender).cross_fitted
    assert folds is not None
    return folds


@pytest.fixture(scope="module")
def watched(
    staged_settings: dict[str, Any], crossed: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[list[int], list[Tensor | None]]], list[EvaluationRows]]:
    """A whole run: the folds of each (micro-)batch and those its states were asked for; the rows of the batches."""
    output = tmp_path_factory.mktemp("watched") / "run"
    steps: list[tuple[list[int], list[Tensor | None]]] = []
    rows: list[EvaluationRows] = []
    asked: list[Tensor | None] = []
    states, backward, build = FrozenRecommender.states, StageTrainer._backward, BatchBuilder.training_batch

    def reading(self: Any, items: Tensor, cu_seqlens: Tensor, folds: Tensor | None = None) -> Tensor:
        asked.append(folds)
        return states(self, items, cu_seqlens, folds)

    def stepping(self: Any, part: PackedBatch, *arguments: Any) -> Any:
        asked.clear()
        values = backward(self, part, *arguments)
        assert part.folds is not None
        steps.append((part.folds.tolist(), list(asked)))
        return values

    def building(self: Any, chosen: EvaluationRows, **options: Any) -> PackedBatch:
        rows.append(chosen)
        return build(self, chosen, **options)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is to be warned of
        patch.setattr(FrozenRecommender, "states", reading)
        patch.setattr(StageTrainer, "_backward", stepping)
        patch.setattr(BatchBuilder, "training_batch", building)
        train_laser(config_of({**staged_settings, "output": str(output)}, crossed), progress=False)
    return output, steps, rows


def test_by_default_all_stages_read_the_folds_of_their_rows(watched: Any, crossed: Path) -> None:
    _, steps, rows = watched
    folds = folds_of(crossed)
    assert len(rows) == 12  # two epochs of two batches in each of three stages
    for chosen in rows:
        assert chosen.folds is not None and (chosen.folds == folds.user_folds[chosen.users]).all()
    assert len(steps) > 12  # some batches went through in parts
    seen = set()
    for own, asked in steps:
        assert asked[0] is not None and asked[0].tolist() == own and min(own) >= 0
        assert asked[1:] in ([], [None])  # items, which have no user, are the full model's
        seen |= set(own)
    assert seen == {0, 1, 2}


def test_a_resumed_run_with_folds_is_the_run_that_never_stopped(
    watched: Any, crossed: Path, staged_settings: dict[str, Any], tmp_path: Path, assert_same_run: Same
) -> None:
    config = config_of({**staged_settings, "output": str(tmp_path / "run")}, crossed, training={"save_steps": 1})
    backward, calls = StageTrainer._backward, []

    def dying(self: Any, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return backward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "_backward", dying)
        with pytest.raises(KeyboardInterrupt):
            train_laser(config, progress=False)
    train_laser(config, resume=True, progress=False)
    assert_same_run(tmp_path / "run", watched[0])


def test_a_run_goes_on_with_the_same_folds_only(tiny_settings: dict[str, Any], crossed: Path) -> None:
    inputs = load_inputs(config_of(tiny_settings, crossed))
    known = fingerprint(inputs)
    recommender = inputs.recommender
    assert recommender is not None
    with torch.no_grad():
        recommender.cross_fitted.models[2].norm.bias[0] += 1  # type: ignore[attr-defined]
    assert {name for name, value in fingerprint(inputs).items() if known[name] != value} == {"recommender"}


def test_the_saved_model_has_the_full_recommender_only(watched: Any, crossed: Path) -> None:
    names = {file.name for file in (watched[0] / "checkpoint").glob("recommender*")}
    assert names == {"recommender.json", "recommender.safetensors"}
    model = LaserModel.from_pretrained(watched[0] / "checkpoint")
    assert model.recommender is not None and model.recommender.recommender.cross_fitted is None  # type: ignore[union-attr]
    assert len(model.recommend([["i3", "i4"]], 2)[0]) == 2


def test_the_prefix_of_a_row_is_written_from_the_states_of_its_fold(
    tiny_settings: dict[str, Any], crossed: Path
) -> None:
    config = config_of(tiny_settings, crossed)
    inputs = load_inputs(config)
    torch.manual_seed(0)
    model = LaserModel.from_pretrained(
        config.lm.path, items=inputs.dataset.items, recommender=crossed, config=config.model_dump(include=set(SECTIONS))
    ).eval()
    rows = laser_rows(config, inputs).select([3, 20, 41, 60])
    batch = model.builder.training_batch(rows, with_positives=False)
    assert batch.folds is not None and len(set(batch.folds.tolist())) > 1
    prefix = model.write_prefix(batch)[0]
    served = model.write_prefix(replace(batch, folds=None))[0]
    recommender = load_recommender(crossed)
    assert prefix is not None and served is not None and model.mformer is not None
    for row, fold in enumerate(batch.folds.tolist()):
        one = batch.select([row])
        states = recommender.fold_states(one.items, one.cu_seqlens, fold)
        torch.testing.assert_close(prefix[row : row + 1], model.mformer(states, one.cu_seqlens).prefix)
        assert not torch.allclose(prefix[row], served[row], atol=1e-5)


def test_rows_of_other_loops_keep_their_fold(tiny_data: Path, crossed: Path, tiny_lm: Path) -> None:
    split, folds = leave_one_out(SequenceDataset.load(tiny_data)), folds_of(crossed)
    dataset = NextItemDataset(training_rows(split.train, 4, folds.of_users(split.train_users)))
    model = LaserModel.from_pretrained(
        tiny_lm,
        items=SequenceDataset.load(tiny_data).items,
        recommender=crossed,
        config={"mformer": {"width": 16, "num_layers": 1, "num_heads": 2, "num_experts": 2, "num_queries": 2}},
    )
    chosen = [3, 17, 60]
    batch = NextItemCollator(model.builder)([dataset[row] for row in chosen])["batch"]
    users = split.train_users[dataset.rows.users[chosen]]
    assert batch.folds is not None and batch.folds.tolist() == folds.user_folds[users].tolist()
    assert batch.positives is not None and batch.positives.folds is None
    bare = NextItemDataset(training_rows(split.train, 4))
    assert NextItemCollator(model.builder)([bare[row] for row in chosen])["batch"].folds is None


def test_in_sample_states_are_warned_of_once_with_the_gap(
    tiny_settings: dict[str, Any], tiny_recommender: Path, crossed: Path, tmp_path: Path
) -> None:
    gap = load_recommender(tiny_recommender).gap
    inputs = load_inputs(config_of(tiny_settings, tiny_recommender))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = laser_rows(config_of(tiny_settings, tiny_recommender), inputs)
        assert laser_rows(config_of(tiny_settings, tiny_recommender), inputs, warn=False).folds is None
    assert rows.folds is None and len(caught) == 1
    assert str(caught[0].message).endswith(
        f"got one that has ({gap}); train it with `laser-fast recommender train ... --folds 3`"
    )
    inputs.recommender.gap = None  # type: ignore[union-attr]
    config = config_of(tiny_settings, tiny_recommender)
    with pytest.warns(UserWarning, match=r"got one that has \(NDCG@10 0\.\d+ on 73 training rows"):
        laser_rows(config, inputs)
    config = config_of(tiny_settings, crossed, mformer={"states": "in-sample"})
    with pytest.warns(UserWarning, match='set mformer.states to "auto"'):
        assert laser_rows(config, load_inputs(config)).folds is None


def test_cross_fitted_states_need_folds(tiny_settings: dict[str, Any], tiny_recommender: Path) -> None:
    config = config_of(tiny_settings, tiny_recommender, mformer={"states": "cross-fitted"})
    with pytest.raises(
        ValueError, match="recommender must have folds when mformer.states is 'cross-fitted', got a SAS"
    ):
        laser_rows(config, load_inputs(config))


def test_a_linear_prefix_reads_the_same_states(tiny_settings: dict[str, Any], crossed: Path) -> None:
    config = config_of(tiny_settings, crossed, bituning={"prefix": "linear"}, training={"pretrain": {"epochs": 0}})
    folds = laser_rows(config, load_inputs(config)).folds
    assert folds is not None and set(folds.tolist()) == {0, 1, 2}


def test_a_prefix_that_reads_no_state_needs_no_folds(tiny_settings: dict[str, Any], crossed: Path) -> None:
    config = config_of(tiny_settings, crossed, bituning={"prefix": "shared"}, training={"pretrain": {"epochs": 0}})
    assert laser_rows(config, load_inputs(config)).folds is None


def test_folds_that_do_not_fit_are_refused(tiny_data: Path) -> None:
    split = leave_one_out(SequenceDataset.load(tiny_data))
    with pytest.raises(ValueError, match=r"training_rows: folds must be one for each of 30 sequences, got \(29,\)"):
        training_rows(split.train, 4, np.zeros(29, dtype=np.int64))
    rows = training_rows(split.train, 4).select([0, 1])
    with pytest.raises(ValueError, match=r"folds must be one int64 for each of the 2 rows, got int8 of shape \(2,\)"):
        replace(rows, folds=np.zeros(2, dtype=np.int8))
    kept = replace(rows, folds=np.array([2, 0])).select([1, 1]).folds
    assert kept is not None and kept.tolist() == [0, 0]
