"""What transformers' TrainingArguments ask of a model: compiled steps, checkpointed layers, evaluation in bfloat16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, Trainer, TrainingArguments

from laser_fast import LaserModel
from laser_fast.data import SequenceDataset, leave_one_out, training_rows
from laser_fast.data.loading import NextItemCollator, NextItemDataset

# a step is cut in so many graphs, whatever the layers of the language model
MOST_GRAPHS = 20
CONFIG: dict[str, Any] = {
    "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
    "mformer": {
        "width": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_experts": 3,
        "num_queries": 2,
        "max_history": 4,
        "dropout": 0.0,
    },
    "bituning": {"dropout": 0.0},
}
DEEP = CONFIG | {"bituning": {"dropout": 0.0, "prefix_mode": "kv"}}


@pytest.fixture(autouse=True)
def _no_compilations_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> NextItemDataset:
    return NextItemDataset(training_rows(leave_one_out(SequenceDataset.load(tiny_data)).train, 4))


@pytest.fixture(scope="module")
def llama() -> LlamaModel:
    """Grouped queries; three layers, of which the last is run for the last positions alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=16, num_key_value_heads=1, max_position_embeddings=128, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)  # at the initial scale all texts look alike
    return model


@pytest.fixture
def make(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path, llama: LlamaModel) -> Any:
    def made(kind: str, config: dict[str, Any] = CONFIG) -> LaserModel:
        torch.manual_seed(0)
        items = SequenceDataset.load(tiny_data).items
        options: dict[str, Any] = {"items": items, "recommender": tiny_recommender, "config": config}
        if kind == "llama":
            options["tokenizer"] = AutoTokenizer.from_pretrained(tiny_lm)
        model = LaserModel.from_pretrained(llama if kind == "llama" else tiny_lm, **options)
        model.refresh_items()
        return model.eval()

    return made


def step(run: Any, model: LaserModel, rows: NextItemDataset, chosen: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the rows `chosen`."""
    model.zero_grad()
    loss = run(**NextItemCollator(model.builder)([rows[row] for row in chosen])).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 20
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found[1].values())
    for name, gradient in expected[1].items():  # float32, summed in another order; some biases have rounding alone
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_traced_with_its_backward_has_the_gradients_of_a_plain_one(make: Any, rows: NextItemDataset) -> None:
    model = make("bert")
    expected = step(model, model, rows, [0, 5, 9])
    assert_same_step(step(torch.compile(model, backend="aot_eager"), model, rows, [0, 5, 9]), expected)


def test_few_compilations_serve_batches_of_all_sizes(make: Any, rows: NextItemDataset) -> None:
    model = make("llama", DEEP)
    compiled, graphs = torch.compile(model, backend="eager", dynamic=True), []
    for chosen in ([0, 5, 9], [1, 2], [3, 4, 6, 7, 8], [11, 20, 30, 31], [40, 41]):
        expected = step(model, model, rows, chosen)
        assert_same_step(step(compiled, model, rows, chosen), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 5 < graphs[0] <= MOST_GRAPHS
    assert graphs[1] == graphs[-1] <= 2 * MOST_GRAPHS  # sizes that the first batch had by chance are symbols by then


def test_a_compiled_language_model_has_the_gradients_of_a_plain_one(make: Any, rows: NextItemDataset) -> None:
    model = make("llama")
    expected = step(model, model, rows, [0, 5, 9]), model.encode_items()
    model.lm.model.compile(backend="eager")
    try:
        assert_same_step(step(model, model, rows, [0, 5, 9]), expected[0])
        assert counters["stats"]["unique_graphs"] > 0
        torch.testing.assert_close(model.encode_items(), expected[1], rtol=1e-5, atol=1e-5)
    finally:
        model.lm.model._compiled_call_impl = None  # of all tests


def trainer(model: LaserModel, rows: NextItemDataset, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    asked = TrainingArguments(str(folder), **(settings | arguments))
    return Trainer(model, asked, train_dataset=rows, data_collator=NextItemCollator(model.builder))


@pytest.mark.parametrize(
    "arguments",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=["compile", "checkpointing", "autocast"],
)
def test_a_trainer_reaches_the_loss_of_a_plain_one(
    arguments: dict[str, Any], make: Any, rows: NextItemDataset, tmp_path: Path
) -> None:
    losses = []
    for options in ({}, arguments):
        model = make("bert")
        losses.append(trainer(model, rows, tmp_path, **options).train().training_loss)
        assert model.is_gradient_checkpointing == ("gradient_checkpointing" in options)
    assert losses[0] > 1.0
    # what autocast rounds to bfloat16 is off by up to 2^-9
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if "bf16" in arguments else 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_evaluation_in_bfloat16_is_refused_before_anything_is_moved(
    make: Any, rows: NextItemDataset, tmp_path: Path
) -> None:
    model = make("bert")
    asked = trainer(model, rows, tmp_path, bf16_full_eval=True)
    with pytest.raises(
        TypeError, match=r"LaserModel: parameters must stay torch.float32, got a move to torch.bfloat16"
    ):
        asked.evaluate(rows)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_checkpointed_layers_keep_less_for_the_same_gradients(
    kind: str, offload: bool, make: Any, rows: NextItemDataset
) -> None:
    model = make(kind)

    def kept() -> tuple[int, tuple[Tensor, dict[str, Tensor]]]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = step(model, model, rows, [0, 5, 9])
        return sum(sizes), found

    before, expected = kept()
    model.activation_checkpointing_enable(offload=offload)
    assert model.lm.execution.checkpointing == ("offload" if offload else "full")
    less, found = kept()
    assert_same_step(found, expected)
    assert less < before or offload  # hooks of its own see what is offloaded
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert kept()[0] == before


def test_what_checkpointing_does_not_know_is_refused(make: Any) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=r"use_reentrant and offload alone are known, got \{'debug': True\}"):
        model.gradient_checkpointing_enable({"use_reentrant": True, "debug": True})
    with pytest.raises(ValueError, match=r"got \{'every_n_layers': 2\}"):
        model.activation_checkpointing_enable(every_n_layers=2)
    model.serving.use("compile", backend="eager")
    with pytest.raises(RuntimeError, match=r"layers must not be compiled .* call serving.use\(\"none\"\) first"):
        model.gradient_checkpointing_enable()
    model.serving.use("none")
    model.gradient_checkpointing_enable()
