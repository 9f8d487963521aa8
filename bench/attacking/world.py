"""Models and data that are attacked: tiny, made on the spot by the commands that a user would give."""

from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from made_data import made_log, made_tokenizer

from attacking.children import ask, done, laser_fast

RECOMMENDER = ("--folds", "2", "--set", "width=8", "--set", "num_layers=1", "--set", "max_length=8")
RECOMMENDER = (*RECOMMENDER, "--set", "epochs=4", "--set", "batch_size=16")
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LARGER = 10.0  # weights: at the initial scale all texts look alike


class World:
    """Everything is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uninterrupted: dict[str, tuple[dict[str, Any], float]] = {}  # by command: what it writes, in which time
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def sources(self) -> tuple[Path, Path]:
        """An interaction log and an item file."""
        made = made_log(self.folder, users=40, items=30, events=6)
        return Path(made["interactions"]), Path(made["items"])

    @cached_property
    def data(self) -> Path:
        """A prepared data set."""
        log, items = self.sources
        done(["prepare", "data", "--interactions", log, "--items", items], self.folder)
        return self.folder / "data"

    def recommender(self, seed: int = 0) -> Path:
        """A SASRec with the models of two folds."""
        place = self.folder / f"recommender-{seed}"
        if not place.exists():
            done(["recommender", "train", self.data, place, *RECOMMENDER, "--seed", str(seed)], self.folder)
        return place

    def language_model(self, kind: str = "bert") -> Path:
        """A random one of two layers, with a tokenizer of words."""
        place = self.folder / kind
        if not place.exists():
            place.mkdir()
            ask(lambda: _make_language_model(kind, place), self.folder)
        return place / "tokenizer"

    @cached_property
    def configuration(self) -> Path:
        """Of a training with all stages and dropout, which keeps its state after every step; the output is not set."""
        epochs = {"pretrain": 1, "phase_a": 2, "phase_b": 1}
        stages = {name: {"epochs": count, "rows_per_epoch": 24} for name, count in epochs.items()}
        mformer = {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4}
        values = {
            "data": str(self.data),
            "recommender": str(self.recommender()),
            "output": "run",
            "lm": {"path": str(self.language_model())},
            "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
            "mformer": mformer,
            "bituning": {"readout": "suffix"},
            "text": {"residual": False},
            "objective": {"num_negatives": 1, "mask_history": False, "popularity": False},
            "training": {"batch_size": 12, "save_steps": 1, **stages, "optimizer": {"learning_rate": 0.03}},
            "evaluation": {"calibrate": False},
        }
        file = self.folder / "train.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    def train_words(self, out: str | Path, seed: int) -> list[str | Path]:
        """The command that trains."""
        return ["train", self.configuration, "--set", f"output={out}", "--set", f"training.seed={seed}"]

    def run(self, seed: int = 0) -> Path:
        """A finished training."""
        place = self.folder / f"run-{seed}"
        if not place.exists():
            done([*self.train_words(place, seed), "--set", "evaluation.calibrate=true"], self.folder)
        return place

    def saved(self, seed: int = 0) -> Path:
        """The Laser of a run, saved on its own."""
        place = self.folder / f"saved-{seed}"
        if not place.exists():
            run = self.run(seed)

            def save() -> None:
                from laser_fast import LaserModel

                LaserModel.from_pretrained(run).save_pretrained(place)

            ask(save, self.folder)
        return place

    def stopped(self, seed: int = 0) -> Path:
        """A run in which the two states from before its last step are left."""
        place = self.folder / f"stopped-{seed}"
        if not place.exists():
            words = self.train_words(place, seed)

            def stop() -> int:
                from laser_fast.runs.resume import StateFolder
                from laser_fast.runs.run_directory import RunDirectory

                StateFolder.clear = RunDirectory.finish = lambda self: None  # type: ignore[method-assign]
                return laser_fast(*words)()

            ask(stop, self.folder)
        return place

    def histories(self) -> list[list[str]]:
        """Of every user, by the ids of items."""
        from laser_fast.data import SequenceDataset

        data = SequenceDataset.load(self.data)
        return [
            [data.items.ids[item] for item in data.sequence(user)[: 1 + user % 5]] for user in range(data.num_users)
        ]


def model(world: World, kind: str = "bert", **settings: Any) -> Any:
    """An untrained Laser around a language model of this kind, with its item matrix; to be called in a child."""
    import torch

    from laser_fast import LaserModel
    from laser_fast.data import SequenceDataset
    from laser_fast.recommenders.recommender_files import load_recommender

    torch.manual_seed(0)
    known = yaml.safe_load(world.configuration.read_text())
    made = LaserModel.from_pretrained(
        str(world.language_model(kind)),
        items=SequenceDataset.load(world.data).items,
        recommender=load_recommender(world.recommender()),
        config={key: known[key] for key in _OF_A_MODEL} | settings,
    )
    made.refresh_items()
    return made.eval()


_OF_A_MODEL = ("prompt", "mformer", "bituning", "text", "objective")


def _make_language_model(kind: str, place: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

    folder = made_tokenizer(place)
    sizes = {**_SIZES, "vocab_size": len(AutoTokenizer.from_pretrained(folder)), "max_position_embeddings": 256}
    torch.manual_seed(0)
    made = BertModel(BertConfig(**sizes)) if kind == "bert" else LlamaModel(LlamaConfig(**sizes, num_key_value_heads=1))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(_LARGER)
    made.save_pretrained(folder)
