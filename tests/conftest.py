"""What every test relies on: Triton's interpreter where there is no GPU, poisoned fresh memory, the marker `gpu`."""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

# a look at device files: asking torch would start CUDA while tests are collected
_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()

if not _HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

_TIMES = ("time_s", "text_tokens_per_s")
_WORDS = ["red", "blue", "green", "small", "large", "bolt", "nut", "drill", "saw", "glove"]


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, ",", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # at the initial scale all texts look alike
                    parameter.mul_(10.0)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared data set: 30 users walk through 25 items, each step to the next item (25 = 5 x 5 words)."""
    from laser_fast.data import PrepareRequest, prepare

    folder = tmp_path_factory.mktemp("data")
    items = [f"i{index},{_WORDS[index // 5]} {_WORDS[5 + index % 5]}" for index in range(25)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n", encoding="utf-8")
    events = [f"u{user},i{(user * 3 + step) % 25},{step}" for user in range(30) for step in range(4 + user % 4)]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n", encoding="utf-8")
    prepare(PrepareRequest(out=folder / "set", interactions=folder / "events.csv", items=folder / "items.csv"))
    return folder / "set"


@pytest.fixture(scope="session")
def tiny_recommender(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SASRec trained for two epochs on `tiny_data`."""
    from laser_fast.config import RecommenderConfig
    from laser_fast.data import SequenceDataset, leave_one_out
    from laser_fast.training.recommender.train_recommender import train_recommender

    folder = tmp_path_factory.mktemp("recommender") / "sasrec"
    dataset = SequenceDataset.load(tiny_data)
    config = RecommenderConfig(width=8, num_layers=1, max_length=10, epochs=2, folds=0)
    train_recommender(leave_one_out(dataset), dataset.num_items, config, seed=0, run_dir=folder, progress=False)
    return folder


@pytest.fixture
def claimed_elsewhere() -> Callable[[Path], AbstractContextManager[None]]:
    """`with claimed_elsewhere(output)`: another process is at work on it."""
    from laser_fast.files.locks import lock_file

    @contextmanager
    def hold(output: Path) -> Iterator[None]:
        with lock_file(output).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return hold


@pytest.fixture
def start_at_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`start_at_once(number, start)` calls `start(hold)` in so many processes, forked from this one, let go together.

    Who gets through to `hold` waits there until all others were refused. Gives the errors of those, and demands that
    one gets through.
    """
    folder = tmp_path_factory.mktemp("starts")

    def call(start: Callable[[Callable[[], None]], object], number: int) -> None:
        def hold() -> None:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("refused.*"))) < number - 1 and time.monotonic() < deadline:
                time.sleep(0.01)

        try:
            start(hold)
            (folder / f"won.{os.getpid()}").touch()
        except Exception as error:
            (folder / "lost").mkdir(exist_ok=True)
            (folder / "lost" / str(os.getpid())).write_text(f"{type(error).__name__}: {error}")
            (folder / "lost" / str(os.getpid())).rename(folder / f"refused.{os.getpid()}")  # whole when it is seen

    def start_all(number: int, start: Callable[[Callable[[], None]], object]) -> list[str]:
        read, write = os.pipe()
        children = []
        for _ in range(number):
            if (child := os.fork()) == 0:
                try:
                    os.close(write)
                    os.read(read, 1)  # comes back when the other end is closed, for all at once
                    call(start, number)
                finally:
                    os._exit(0)
            children.append(child)
        os.close(write)
        for child in children:
            os.waitpid(child, 0)
        os.close(read)
        assert len(list(folder.glob("won.*"))) == 1
        return [path.read_text() for path in folder.glob("refused.*")]

    return start_all


@pytest.fixture
def tiny_settings(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration, as a dictionary, under which Laser trains in seconds."""
    return {
        "data": str(tiny_data),
        "recommender": str(tiny_recommender),
        "output": str(tmp_path / "run"),
        "lm": {"path": str(tiny_lm)},
        "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4},
        "bituning": {"readout": "suffix"},
        "text": {"residual": False},
        "objective": {"mask_history": False, "popularity": False},
        "training": {
            "batch_size": 16,
            "pretrain": {"epochs": 1},
            "phase_a": {"epochs": 2},
            "phase_b": {"epochs": 1},
        },
    }


@pytest.fixture(scope="session")
def new_laser(tiny_lm: Path, tiny_recommender: Path) -> Callable[..., Any]:
    """`new_laser(**arguments)`: `LaserModel.from_pretrained` of the tiny language model, recommender and 25 titles."""
    from laser_fast import LaserModel

    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4}
    config = {"prompt": {"user_template": "{history}", "separator": ",", "max_items": 4}, "mformer": sizes}
    titles = [f"{one} {other}" for one in _WORDS[:5] for other in _WORDS[5:]]

    def make(pretrained: Any = tiny_lm, config_of: Any = None, seed: int = 0, **arguments: Any) -> Any:
        torch.manual_seed(seed)
        values: dict[str, Any] = {"items": {f"i{place}": title for place, title in enumerate(titles)}}
        values |= {"recommender": tiny_recommender, "config": {**config, **(config_of or {})}}
        return LaserModel.from_pretrained(pretrained, **values | arguments)

    return make


@pytest.fixture
def make_laser(tiny_settings: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    """`make(lm, **sections)`: an untrained Laser around the tiny BERT or a random causal decoder, and its inputs."""
    from transformers import AutoModel, LlamaConfig

    from laser_fast.config import LaserConfig, build_config
    from laser_fast.laser.build import build_laser, load_inputs, load_language_model

    def make(lm: str = "bert", **sections: dict[str, Any]) -> tuple[Any, Any]:
        values = tiny_settings | {"training": {**tiny_settings["training"], "pretrain": {"epochs": 0}}}
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        config = build_config(LaserConfig, values)
        language_model, tokenizer = load_language_model(config.lm)
        torch.manual_seed(0)
        if lm == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            heads = {"vocab_size": len(tokenizer), "num_key_value_heads": 2}
            language_model = AutoModel.from_config(LlamaConfig(**heads, **sizes))
            with torch.no_grad():
                for parameter in language_model.parameters():
                    parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)  # so that attention matters
        inputs = load_inputs(config)
        return build_laser(config, inputs, language_model, tokenizer), inputs

    return make


@pytest.fixture(scope="session")
def tokens_seen() -> Callable[[Any], list[int]]:
    """`tokens_seen(model)`: a list that gets the number of packed tokens of every call of its language model."""

    def watch(model: Any) -> list[int]:
        seen: list[int] = []
        model.lm.model.register_forward_pre_hook(
            lambda module, given, named: seen.append(named["inputs_embeds"].shape[1]), with_kwargs=True
        )
        return seen

    return watch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN (integers: the largest), so that a result nobody wrote cannot look right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill_before


@pytest.fixture
def worst_row_error() -> Callable[[Tensor, Tensor], float]:
    """Largest relative L2 error over rows (last dimension); the second argument is exact, in float64."""

    def measure(actual: Tensor, exact: Tensor) -> float:
        assert exact.dtype == torch.float64
        assert actual.shape == exact.shape
        if exact.numel() == 0:
            return 0.0
        actual, exact = actual.detach(), exact.detach()
        scale = exact.norm(dim=-1).clamp_min(1e-30)
        return float(((actual.double() - exact).norm(dim=-1) / scale).max())

    return measure


@pytest.fixture
def assert_accurate(worst_row_error: Callable[[Tensor, Tensor], float]) -> Callable[..., None]:
    """`check(actual, eager, exact, name)`, the rule for kernels: the worst row at most twice as wrong as plain PyTorch
    in the same dtype, plus one eps. Where `eager` are several, drawn as needed, the worst of them counts."""

    def check(actual: Tensor, eager: Tensor | Iterable[Tensor], exact: Tensor, name: str) -> None:
        error, worst, limit = worst_row_error(actual, exact), 0.0, 0.0
        for plain in [eager] if isinstance(eager, Tensor) else eager:
            assert actual.dtype == plain.dtype, name
            worst = max(worst, worst_row_error(plain, exact))
            limit = 2 * worst + torch.finfo(actual.dtype).eps
            if error <= limit:
                return
        raise AssertionError(f"{name}: worst row is off by {error:.3g}, allowed are {limit:.3g}")

    return check


@pytest.fixture(scope="session")
def pack() -> Callable[..., tuple[Tensor, Tensor]]:
    """`pack(history, ...)`: items int64 [N] and cu_seqlens int32 [B+1]."""

    def packed(*histories: Iterable[int] | Tensor) -> tuple[Tensor, Tensor]:
        items = [torch.as_tensor(history, dtype=torch.int64) for history in histories]
        lengths = torch.tensor([0, *map(len, items)])
        return torch.cat([*items, torch.empty(0, dtype=torch.int64)]), lengths.cumsum(0).int()

    return packed


@pytest.fixture
def damage_files() -> Callable[..., int]:
    """`damage(folder, load, same, times)`: flip a bit of a file, or cut its end off, over and over; each time `load()`
    refuses with a ValueError that names the file, or gives what `same` finds equal. How often it refused."""

    def damage(folder: Path, load: Callable[[], Any], same: Callable[[Any], bool], times: int) -> int:
        draw, refused = random.Random(0), 0
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for number in range(times):
            file = files[number % len(files)]
            content = file.read_bytes()
            place = draw.randrange(len(content))
            flipped = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
            file.write_bytes(content[:place] if number % 5 == 0 else flipped)
            said, loaded = "", None
            try:
                loaded = load()
            except ValueError as error:
                said = str(error)
            file.write_bytes(content)
            if loaded is None:  # a seal may name a file that is not there
                assert file.name in said or file.name == "seal.json", (file.name, said)
                assert len(said.splitlines()) == 1, said
                refused += 1
            else:
                assert same(loaded), (file.name, place)
        return refused

    return damage


@pytest.fixture(scope="session")
def staged_settings(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path) -> dict[str, Any]:
    """A run with dropout, micro-batches, negatives and all stages, of 12 steps; the output is still to be set."""
    stage = {"epochs": 2, "rows_per_epoch": 24}
    return {
        "data": str(tiny_data),
        "recommender": str(tiny_recommender),
        "output": "",
        "lm": {"path": str(tiny_lm)},
        "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4},
        "bituning": {"readout": "suffix"},
        "text": {"residual": False},
        "objective": {"num_negatives": 1, "mask_history": False, "popularity": False},
        "training": {
            "batch_size": 16,
            "micro_batch_tokens": 160,
            "pretrain": stage,
            "phase_a": stage,
            "phase_b": stage,
            "optimizer": {"learning_rate": 0.03},
        },
        "evaluation": {"calibrate": False},
    }


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Two finished runs are one, bit by bit; where they kept their last state, up to that."""
    return _assert_same_run


def _newest_state(run: Path) -> Path:
    return max((run / "states").iterdir())


def _log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def _assert_same_run(run: Path, whole: Path) -> None:
    """The best checkpoint, the log, and where the last state is kept: parameters, moments, generators, position."""
    assert json.dumps(_log_of(run)) == json.dumps(_log_of(whole))  # every bit, and in one order
    for name in ("adapter.safetensors", "items.safetensors"):
        assert (run / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes(), name
    if not (run / "states").exists():
        return
    from safetensors.torch import load_file as _load_tensors

    last, expected = (_load_tensors(_newest_state(folder) / "tensors.safetensors") for folder in (run, whole))
    assert last.keys() == expected.keys()
    assert all(torch.equal(last[name], expected[name]) for name in expected)
    values = [json.loads((_newest_state(folder) / "values.json").read_text()) for folder in (run, whole)]
    for value in values:
        del value["position"]["log_bytes"], value["sums"]["counts"]["time_s"]
    assert values[0] == values[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
