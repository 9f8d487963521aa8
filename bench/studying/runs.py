"""One run of a variant, ranked in every way the table shows; what was measured stays beside the run."""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from laser_fast.config import LaserConfig, build_config
from laser_fast.config.settings import apply_overrides
from laser_fast.data import EvaluationRows, PackedSequences, Split
from laser_fast.evaluation import evaluate, evaluate_candidates, fit_calibration, llara_candidates
from laser_fast.files.atomic import replace_json
from laser_fast.laser import LaserModel
from laser_fast.laser.build import build_laser, load_inputs, load_language_model, training_counts
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.models.text_scorers import CatalogueTexts, TextRecommender, TextSimilarity, text_vectors
from laser_fast.recommenders import ItemKNN, Markov1, Popularity, Scorer
from laser_fast.training.train import train_laser
from studying.variants import CACHED, VARIANTS, Variant

Ranked = dict[str, Any]
"""Of one system: "valid", the NDCG@10 it was fitted to on validation rows, and "ranks" of the rows that count."""

METRIC = "NDCG@10"
WHOLE = "whole system"
_RECENCY = 0.8
_DRAWS = 20
_ROWS_AT_ONCE = 256


def read_texts_once(work: Path) -> None:
    """Let all runs in `work` share the vectors of the catalogue's texts, which depend on no setting they vary."""
    compute = CatalogueTexts.vectors

    def vectors(self: CatalogueTexts, lm: FrozenLM, *, batch_size: int = 64) -> Tensor:
        digest = hashlib.sha256(b"".join(builder.texts.input_ids.tobytes() for builder in self.builders))
        known = work / f"vectors-{digest.hexdigest()[:16]}.safetensors"
        if not known.is_file():
            save_file({"vectors": compute(self, lm, batch_size=batch_size).cpu()}, known)
        return load_file(known)["vectors"]

    CatalogueTexts.vectors = vectors  # type: ignore[method-assign]


def encode_users_once() -> None:
    """Let a model encode a history once for the weights it has: validation rows are scored in training and after it."""
    compute = LaserModel.encode_users
    known: WeakKeyDictionary[LaserModel, dict[bytes, Tensor]] = WeakKeyDictionary()

    def encode_users(self: LaserModel, histories: PackedSequences, *, batch_size: int = 128) -> Tensor:
        trained = [parameter.detach().cpu().numpy() for parameter in self.parameters() if parameter.requires_grad]
        weights = hashlib.sha256(b"".join(values.tobytes() for values in trained)).digest()
        users = known.setdefault(self, {})
        keys = [weights + histories[row].tobytes() for row in range(len(histories))]
        new = [row for row, key in enumerate(keys) if key not in users]
        encoded = compute(self, histories.select(new), batch_size=batch_size)
        users.update(zip((keys[row] for row in new), encoded, strict=True))
        return torch.stack([users[key] for key in keys]) if keys else encoded

    LaserModel.encode_users = encode_users  # type: ignore[method-assign]


def folder_of(work: Path, variant: Variant, seed: int) -> Path:
    """Where a run is kept."""
    return work / f"{re.sub(r'[^a-z0-9]+', '-', variant.name.lower()).strip('-')}-{seed}"


def is_kept(variant: Variant, seed: int, work: Path) -> bool:
    """Whether a run was trained and ranked, by an earlier command."""
    return folder_of(work, variant, seed).with_suffix(".json").is_file()


class Remembered:
    """A scorer that scores every history of a split once, however often it is asked. Satisfies `Scorer`.

    Args:
        kept: file with the scores of an earlier one, or to be written.
    """

    def __init__(self, scorer: Scorer, split: Split, kept: Path | None = None) -> None:
        self.num_items = scorer.num_items
        self._place: dict[bytes, int] = {}  # rows of one history have one score: the last is as good as the first
        known = kept is not None and kept.is_file()
        parts, count = [], 0
        for rows in (split.valid, split.test):
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                histories = rows.histories.select(range(start, min(start + _ROWS_AT_ONCE, len(rows))))
                self._place |= {histories[row].tobytes(): count + row for row in range(len(histories))}
                count += len(histories)
                packed = torch.from_numpy(histories.items), torch.from_numpy(histories.cu_seqlens)
                parts += [] if known else [scorer.score(*packed)]
        self._scores = load_file(kept)["scores"] if kept is not None and known else torch.cat(parts)
        if kept is not None and not known:
            save_file({"scores": self._scores}, kept)

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See `Scorer.score`; of histories of the split alone."""
        histories = PackedSequences(items.numpy(), cu_seqlens.numpy())
        return self._scores[[self._place[histories[row].tobytes()] for row in range(len(histories))]]


def run_variant(config: LaserConfig, variant: Variant, seed: int, work: Path) -> dict[str, Ranked]:
    """Ranked systems of one run, trained if it was not yet."""
    folder = folder_of(work, variant, seed)
    found = folder.with_suffix(".json")
    if found.is_file():
        known: dict[str, Ranked] = json.loads(found.read_text(encoding="utf-8"))
        return known
    values = config.model_dump(mode="json")
    settings = [f"{key}={json.dumps(value)}" for key, value in variant.settings.items()]
    values = apply_overrides(values, [*settings, f"output={folder}", f"training.seed={seed}"])
    if variant.recommender:
        values["recommender"] += variant.recommender
    if not variant.own_text:
        run_variant(config, VARIANTS[CACHED], seed, work)
        values["text"]["initialize_from"] = str(folder_of(work, VARIANTS[CACHED], seed))
        values["training"]["text"]["epochs"] = 0
    start, finished = time.perf_counter(), (folder / "finished.json").is_file()
    model, inputs = train_laser(build_config(LaserConfig, values), resume=folder.is_dir(), progress=False)
    seconds = time.perf_counter() - start
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    systems: dict[str, dict[str, Scorer]] = {"": {"laser": model}}
    if variant.name == CACHED:
        assert model.text is not None
        systems = {"": {"laser": TextRecommender(model.text, model.objective.temperature)}}
    systems[""] = {"laser": Remembered(systems[""]["laser"], inputs.split, folder / "scores.safetensors")}
    if inputs.recommender is not None:
        systems["with ID score"] = systems[""] | {"recommender": Remembered(inputs.recommender, inputs.split)}
        counted = {"rules": inputs.rules, "neighbors": inputs.neighbors}
        known = {name: Remembered(table, inputs.split) for name, table in counted.items()}
        systems[WHOLE] = systems["with ID score"] | known
    ranked = {name: rank(parts, inputs.split, counts) for name, parts in systems.items()}
    ranked["cosine only"] = {"valid": None, "ranks": rank_rows(systems[""]["laser"], inputs.split)}
    replace_json(found, ranked | {"seconds": {"valid": None, "ranks": [], "value": None if finished else seconds}})
    print(f"{variant.name}, seed {seed}: {seconds:.0f} s", flush=True)
    return run_variant(config, variant, seed, work)


def lines(config: LaserConfig, work: Path) -> dict[str, Ranked]:
    """What trains nothing, or only the recommender: ranked once."""
    found = work / "lines.json"
    if found.is_file():
        known: dict[str, Ranked] = json.loads(found.read_text(encoding="utf-8"))
        return known
    inputs = load_inputs(config)
    model = _untrained(config)
    split, counts = inputs.split, torch.from_numpy(training_counts(inputs.split, model.num_items))
    train = torch.tensor(split.train.items), torch.tensor(split.train.cu_seqlens)
    vectors = text_vectors(model.lm, model.builder)
    zero_shot: dict[str, Scorer] = {
        "text_last": TextSimilarity(vectors),
        "text_history": TextSimilarity(vectors, _RECENCY),
    }
    raw: dict[str, Scorer] = {
        "Popularity": Popularity.fit(*train, model.num_items),
        "Markov-1": Markov1.fit(*train, model.num_items),
        "ItemKNN": ItemKNN.fit(*train, model.num_items),
        "SequentialRules": inputs.rules,
        "zero-shot, last item": zero_shot["text_last"],
    }
    fitted: dict[str, dict[str, Scorer]] = {"zero-shot, calibrated": zero_shot}
    if inputs.recommender is not None:
        raw["SASRec"] = inputs.recommender
        fitted["SASRec, calibrated"] = {"recommender": inputs.recommender}
        fitted["no-training fusion"] = zero_shot | {"recommender": inputs.recommender}
        counted = {"rules": inputs.rules, "neighbors": inputs.neighbors}
        fitted["no-training fusion, whole"] = fitted["no-training fusion"] | counted
    ranked: dict[str, Ranked] = {
        name: {"valid": None, "ranks": rank_rows(scorer, split)} for name, scorer in raw.items()
    }
    scored = ("text_last", "text_history", "recommender")  # all but what is 0 for most items
    ranked |= {name: rank(parts, split, counts, standardize=scored) for name, parts in fitted.items()}
    replace_json(found, ranked)
    return ranked


def _untrained(config: LaserConfig) -> LaserModel:
    """The frozen language model with the catalogue's texts, for lines that train nothing."""
    values = config.model_dump(mode="json")
    values["bituning"]["prefix"], values["text"]["initialize_from"] = "none", None
    plain = build_config(LaserConfig, values)
    return build_laser(plain, load_inputs(plain), *load_language_model(plain.lm))


def rank(
    parts: dict[str, Scorer], split: Split, counts: Tensor, standardize: tuple[str, ...] = ("recommender",)
) -> Ranked:
    """Scalars fitted on the validation rows, and what the sum of the parts ranks with them."""
    named = tuple(name for name in standardize if name in parts)
    fitted, valid = fit_calibration(parts, split.valid, counts, standardize=named)
    if len(split.test):
        return {"valid": valid, "ranks": rank_rows(fitted, split)}
    halves = [np.arange(start, len(split.valid), 2) for start in (0, 1)]
    ranks = np.zeros((len(split.valid), _DRAWS), dtype=np.int64)
    for own, other in (halves, halves[::-1]):
        half, _ = fit_calibration(parts, split.valid.select(other), counts, standardize=named)
        ranks[own] = np.array(rank_rows(half, split))[own]
    return {"valid": valid, "ranks": ranks.tolist()}


def rank_rows(scorer: Scorer, split: Split) -> list[Any]:
    """Ranks of the test rows in the catalogue [B]; without test rows those of the validation rows among 20 [B, 20]."""
    if len(split.test):
        ranks: list[Any] = evaluate(scorer, split.test).ranks.tolist()
        return ranks
    rows: EvaluationRows = split.valid
    drawn = llara_candidates(rows, scorer.num_items, draws=_DRAWS)
    ranks = evaluate_candidates(scorer, rows, drawn).ranks.T.tolist()
    return ranks
