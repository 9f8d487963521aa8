"""M-Former against a loop over users and experts, its invariances, and where its gradients go."""

import warnings

import pytest
import torch
from torch import Tensor

from laser_fast.nn.mformer import MFormer
from laser_fast.nn.qformer import QFormer

LENGTHS = [4, 0, 1, 9]


def make(**options: object) -> MFormer:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 3, "num_heads": 2, "num_experts": 4, "top_k": 2, "num_queries": 3}
    model = MFormer(6, 10, **({"dropout": 0.0} | sizes | options)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.mul_(10.0)  # at the initial scale cross-attention would hardly matter
    return model


def batch(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(sum(lengths), 6, generator=generator, dtype=torch.float64)
    return states, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def test_equals_one_user_and_one_expert_at_a_time() -> None:
    model = make()
    states, cu_seqlens = batch()
    output = model(states, cu_seqlens)
    for user, length in enumerate(LENGTHS):
        own = states[cu_seqlens[user] : cu_seqlens[user + 1]]
        projected = model.state_projection(own)
        alone = torch.tensor([0, length], dtype=torch.int32)
        combined = torch.zeros(3, 16, dtype=torch.float64)
        for choice in range(2):
            expert = int(output.routing.expert[user, choice])
            only = model.query_experts[expert][None]
            answer = model.qformer(only, torch.zeros(1, 1, dtype=torch.int32), projected, alone)[0]
            combined = combined + output.routing.weight[user, choice] * answer
        torch.testing.assert_close(output.queries[user], combined, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(output.prefix[user], model.lm_projection(combined), rtol=1e-6, atol=1e-7)


def expert_by_expert(model: MFormer) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The prefix when every user's queries pass the first self-attention on their own, and the gradients."""
    states, cu_seqlens = batch()
    outputs = []
    for user in range(len(LENGTHS)):
        own = states[cu_seqlens[user] : cu_seqlens[user + 1]]
        outputs.append(model(own, torch.tensor([0, LENGTHS[user]], dtype=torch.int32)).prefix)
    prefix = torch.cat(outputs)
    prefix.square().sum().backward()
    return prefix, [(name, parameter.grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_the_first_self_attention_runs_once_per_expert_not_per_user(training: bool) -> None:
    model, twin = make(num_experts=3).train(training), make(num_experts=3).train(training)
    sizes: list[int] = []
    attention = model.qformer.layers[0].self_attention
    attention.register_forward_hook(lambda module, given, result: sizes.append(given[0].shape[0]))
    states, cu_seqlens = batch()
    prefix = model(states, cu_seqlens).prefix
    prefix.square().sum().backward()
    assert sizes == [3]  # 8 groups of queries, 3 experts
    expected, grads = expert_by_expert(twin)  # one user at a time has 2 groups, so nothing is shared
    torch.testing.assert_close(prefix, expected, rtol=1e-6, atol=1e-7)
    for (name, grad), parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6, msg=name)


def test_dropout_draws_a_mask_per_user() -> None:
    model = make(num_experts=1, top_k=1, dropout=0.5, num_layers=1)
    sizes: list[int] = []
    attention = model.qformer.layers[0].self_attention
    attention.register_forward_hook(lambda module, given, result: sizes.append(given[0].shape[0]))
    states = batch([2])[0].repeat(2, 1)
    prefix = model(states, torch.tensor([0, 2, 4], dtype=torch.int32)).prefix
    assert sizes == [2]
    assert not torch.allclose(prefix[0], prefix[1])
    model.eval()
    prefix = model(states, torch.tensor([0, 2, 4], dtype=torch.int32)).prefix
    assert sizes == [2, 1]
    torch.testing.assert_close(prefix[0], prefix[1])


def test_the_history_matters_and_only_the_own_one() -> None:
    model = make()
    states, cu_seqlens = batch()
    changed = states.clone()
    changed[5:] += 1.0  # the last user's
    before, after = model(states, cu_seqlens), model(changed, cu_seqlens)
    torch.testing.assert_close(before.prefix[:3], after.prefix[:3])
    assert (before.prefix[3] - after.prefix[3]).abs().max() > 1e-3 * before.prefix[3].abs().max()


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 1, "top_k": 1}, {"top_k": 4}, {"top_k": 1}, {"weighting": "renormalize"}],
    ids=["single expert", "k = E", "k = 1", "renormalize"],
)
def test_configurations_run_forward_and_backward(options: dict[str, object]) -> None:
    model = make(**options)
    states, cu_seqlens = batch()
    output = model(states, cu_seqlens)
    output.prefix.square().sum().backward()
    assert output.prefix.shape == (4, 3, 10)
    # through the weights of the experts; that of a single one is 1
    assert float(model.router.weight.grad.abs().max()) > 0 or options.get("top_k") == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["no user", "one empty", "two empty"])
def test_nothing_to_read(lengths: list[int]) -> None:
    model = make()
    states, cu_seqlens = batch(lengths)
    output = model(states, cu_seqlens)
    output.prefix.sum().backward()
    assert output.prefix.shape == (len(lengths), 3, 10)
    assert bool(torch.isfinite(output.prefix).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_cross_attention_sits_in_every_second_layer() -> None:
    layers = QFormer(8, 5, 2).layers
    assert [layer.cross_attention is not None for layer in layers] == [True, False, True, False, True]


def test_the_prefix_starts_at_the_scale_of_token_embeddings() -> None:
    torch.manual_seed(0)
    model = MFormer(6, 64, width=64, num_layers=2, num_heads=4, num_queries=8, dropout=0.0, prefix_rms=0.05)
    states, cu_seqlens = batch()
    rms = model(states.float(), cu_seqlens).prefix.square().mean().sqrt().item()
    assert 0.02 < rms < 0.08  # combining two answers with weights near one half shrinks it somewhat


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to num_experts = 4, got 5"):
        make(top_k=5)
    with pytest.raises(ValueError, match=r"states must be \[N, 6\], got \(2, 5\)"):
        make()(torch.zeros(2, 5), torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="width must be a multiple of num_heads, got 16 and 3"):
        make(num_heads=3)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        make(num_layers=0)
    with pytest.raises(ValueError, match="dtype must be one of auto, bfloat16, float32, got 'float16'"):
        make(dtype="float16")


def test_bfloat16_products_change_no_route_and_hardly_the_prefix() -> None:
    exact, narrow = make(width=64, num_heads=4).float(), make(width=64, num_heads=4, dtype="bfloat16").float()
    states, cu_seqlens = batch()
    found = []
    for model in (exact, narrow):
        output = model(states.float(), cu_seqlens)
        assert output.prefix is not None
        output.prefix.float().square().sum().backward()
        found.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (one, grads), (other, narrow_grads) = found
    for name in ("expert", "weight", "pooled", "balance_loss", "load"):
        assert torch.equal(getattr(one.routing, name), getattr(other.routing, name)), name
    assert other.prefix.dtype == torch.bfloat16 and not torch.equal(one.prefix, other.prefix.float())
    # a product of bfloat16 is off by 2^-9 of its terms; there are three layers of a handful
    difference = (one.prefix - other.prefix.float()).detach()
    assert float(difference.norm() / one.prefix.detach().norm()) < 0.02
    for name, grad in grads.items():
        if name.endswith(("query.bias", "qkv.bias", "key_value.bias")):
            continue  # partly biases of keys, of which a softmax takes no notice: their gradients are rounding
        narrow_grad = narrow_grads[name]
        assert (grad is None) == (narrow_grad is None), name
        if grad is not None and narrow_grad is not None:
            assert narrow_grad.dtype == torch.float32
            assert float((grad - narrow_grad).norm() / grad.norm()) < 0.1, name


def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = make().float(), torch.device("cuda", 0)

    def products(capability: tuple[int, int]) -> object:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this torch may have no autocast of that kind
            return model.products(gpu)

    chosen = products((8, 0))
    assert isinstance(chosen, torch.autocast) and chosen.fast_dtype == torch.bfloat16
    assert not isinstance(products((7, 5)), torch.autocast)
    assert not isinstance(model.products(torch.device("cpu")), torch.autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # somebody has chosen
        narrow = make(dtype="bfloat16").float()
        assert not isinstance(narrow.products(torch.device("cpu")), torch.autocast)
    model.dtype = "float32"
    assert not isinstance(products((9, 0)), torch.autocast)
