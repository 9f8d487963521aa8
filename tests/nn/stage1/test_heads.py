"""The terms of stage 1 against their definitions, one pair at a time in float64; what each trains and may see."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.nn.mformer import MFormer, MFormerOutput
from laser_fast.nn.stage1.heads import (
    Pairs,
    PretrainingHeads,
    TermWeights,
    Vocabulary,
    contrastive_loss,
    pair_similarity,
)
from laser_fast.nn.stage1.matching import matching_pairs

USERS = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)  # histories of 2, 0, 3 and 1 items
TEXTS = torch.tensor([0, 1, 4, 9, 11], dtype=torch.int32)
TABLE = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TERMS = ("contrastive", "matching", "generation")


def build(weights: TermWeights | None = None, *, recompute: bool = False) -> tuple[MFormer, PretrainingHeads]:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 3, "num_heads": 2, "num_experts": 3, "top_k": 2, "num_queries": 3}
    mformer = MFormer(6, None, **sizes, dropout=0.0, recompute=recompute)  # type: ignore[arg-type]
    vocabulary = Vocabulary(torch.arange(7) * 10, TABLE)
    heads = PretrainingHeads(mformer, 5, max_tokens=8, weights=weights or TermWeights(), vocabulary=vocabulary)
    with torch.no_grad():
        for module in (mformer.qformer, heads):
            for parameter in module.parameters():
                if parameter.dim() > 1:  # at the initial scale nothing that is attended to would matter
                    parameter.mul_(8.0)
    return mformer.double(), heads.double()


def states_of() -> Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pairs_of() -> Pairs:
    tokens = torch.randint(0, 7, (11,), generator=torch.Generator().manual_seed(2))
    return Pairs(torch.arange(6), USERS, tokens * 10, TABLE[tokens], TEXTS)


def write(mformer: MFormer) -> MFormerOutput:
    written: MFormerOutput = mformer(states_of(), USERS, keep_layer_inputs=True)
    return written


def own(values: Tensor, bounds: Tensor, row: int) -> Tensor:
    return values[int(bounds[row]) : int(bounds[row + 1])]


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, heads: int) -> Tensor:
    parts = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, -1)


def run_together(
    mformer: MFormer, heads: PretrainingHeads, queries: Tensor, text: Tensor, states: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries [Q, D] and a text [L, D] through all layers under a mask [Q + L, Q + L], one user alone."""
    split = queries.shape[0]
    for layer, feed_forward in zip(mformer.qformer.blocks, heads.text.feed_forwards, strict=True):
        both, attention = torch.cat([queries, text]), layer.self_attention
        query, key, value = attention.qkv(both).chunk(3, -1)
        both = attention.norm(both + attention.out(attend(query, key, value, visible, attention.num_heads)))
        queries, text = both[:split], feed_forward(both[split:])
        if layer.cross_attention is not None:
            cross = layer.cross_attention
            read = torch.zeros_like(queries)
            if len(states):
                key, value = cross.key_value(states).chunk(2, -1)
                everything = torch.ones(split, len(states), dtype=torch.bool)
                read = attend(cross.query(queries), key, value, everything, cross.num_heads)
            queries = cross.norm(queries + cross.out(read))
        queries = layer.feed_forward(queries)
    return queries, text


def embedded(heads: PretrainingHeads, projected: Tensor) -> Tensor:
    result: Tensor = heads.text.norm(projected + heads.text.positions[: len(projected)])
    return result


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_products_in_bfloat16_hardly_change_the_terms(recompute: bool) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        mformer, heads = (module.float() for module in build(recompute=recompute))
        mformer.dtype = dtype
        pairs = replace(pairs_of(), token_embeds=pairs_of().token_embeds.float())
        torch.manual_seed(3)  # of the negatives
        terms = heads(mformer(states_of().float(), USERS, keep_layer_inputs=True), pairs)
        terms["loss"].backward()
        found.append((terms, [parameter.grad for parameter in heads.parameters()]))
    (exact, grads), (narrow, narrow_grads) = found
    for name in TERMS:
        assert narrow[name].dtype == torch.float32 and not torch.equal(narrow[name], exact[name])
        torch.testing.assert_close(narrow[name], exact[name], rtol=1e-2, atol=0)
    assert [grad is None for grad in grads] == [grad is None for grad in narrow_grads]


def test_contrastive_loss_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(3, 2, 4, generator=generator), dim=-1)
    text = F.normalize(torch.randn(3, 4, generator=generator), dim=-1)
    similarity = [[max(float(q @ text[c]) for q in queries[b]) / 0.1 for c in range(3)] for b in range(3)]
    smoothing, total = 0.1, 0.0
    for matrix in (similarity, [list(column) for column in zip(*similarity, strict=True)]):
        for row, values in enumerate(matrix):
            log_sum = math.log(sum(math.exp(value) for value in values))
            for column, value in enumerate(values):
                target = (1 - smoothing) * (row == column) + smoothing / 3
                total += target * (log_sum - value) / 3 / 2
    assert float(contrastive_loss(queries, text, 0.1)) == pytest.approx(total, rel=1e-5)


def test_contrastive_loss_of_shares_is_that_of_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(5, 2, 4, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(5, 4, generator=generator, dtype=torch.float64), dim=-1)

    def others(mine: slice, rest: slice) -> Callable[[Tensor], Tensor]:
        whole = {2: text, 3: queries}
        return lambda rows: torch.cat([rows, whole[rows.dim()][rest]])

    total = 0.0
    for mine, rest in ((slice(0, 2), slice(2, 5)), (slice(2, 5), slice(0, 2))):
        part = contrastive_loss(queries[mine], text[mine], 0.1, others(mine, rest))
        total += float(part) * len(text[mine]) / 5
    assert total == pytest.approx(float(contrastive_loss(queries, text, 0.1)), rel=1e-12)


def test_matching_equals_one_pair_at_a_time() -> None:
    mformer, heads = build()
    written, pairs = write(mformer), pairs_of()
    torch.manual_seed(5)
    values = heads(written, pairs)
    queries = F.normalize(heads.query_projection(written.queries), dim=-1)
    text = heads.text_features(heads.text.embed(pairs.token_embeds, TEXTS), TEXTS)
    torch.manual_seed(5)
    drawn = matching_pairs(pair_similarity(queries, text) / heads.temperature, torch.eye(4, dtype=torch.bool))
    losses, right = [], 0
    assert heads.match is not None and len(drawn[0]) == 12 and int(drawn[2].sum()) == 4
    for user, text_row, true in zip(*(values.tolist() for values in drawn), strict=True):
        assert true == (user == text_row)
        hidden = embedded(heads, heads.text.token_projection(own(pairs.token_embeds, TEXTS, text_row)))
        states = mformer.state_projection(own(states_of(), USERS, user))
        logit = torch.zeros((), dtype=torch.float64)
        for choice in range(2):
            group = mformer.qformer.norm(mformer.query_experts[written.routing.expert[user, choice]])
            visible = torch.ones(3 + len(hidden), 3 + len(hidden), dtype=torch.bool)
            answer, _ = run_together(mformer, heads, group, hidden, states, visible)
            logit = logit + written.routing.weight[user, choice] * (heads.match(answer) - heads.match.bias).mean()
        logit = logit + heads.match.bias[0]
        losses.append(F.softplus(-logit if true else logit))
        right += (float(logit.detach()) > 0) == true
    torch.testing.assert_close(values["matching"], torch.stack(losses).mean(), rtol=1e-8, atol=1e-8)
    assert float(values["matching_accuracy"]) == pytest.approx(right / 12)
    assert float(torch.stack(losses).detach().std()) > 0.05  # pairs differ


def test_generation_equals_one_text_at_a_time() -> None:
    mformer, heads = build()
    written, pairs = write(mformer), pairs_of()
    assert heads.decoder is not None and heads.text.decode_token is not None
    total = torch.zeros((), dtype=torch.float64)
    for user in range(4):
        projected = heads.text.token_projection(own(pairs.token_embeds, TEXTS, user))
        hidden = embedded(heads, torch.cat([heads.text.decode_token[None], projected[:-1]]))
        states, length = mformer.state_projection(own(states_of(), USERS, user)), len(hidden)
        visible = torch.ones(3 + length, 3 + length, dtype=torch.bool).tril()
        visible[:3, :3] = True
        combined = torch.zeros(length, 16, dtype=torch.float64)
        for choice in range(2):
            group = mformer.qformer.norm(mformer.query_experts[written.routing.expert[user, choice]])
            _, answer = run_together(mformer, heads, group, hidden, states, visible)
            combined = combined + written.routing.weight[user, choice] * answer
        target = own(pairs.input_ids, TEXTS, user) // 10
        total = total + F.cross_entropy(heads.decoder(combined) @ TABLE.T, target) / 4
    torch.testing.assert_close(heads(written, pairs)["generation"], total, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["first layer once per expert", "per user"])
def test_layer_inputs_are_what_enters_each_layer(dropout: float) -> None:
    mformer, _ = build()
    mformer.qformer.dropout = dropout  # which draws a mask per user
    written = write(mformer.train())
    assert [tuple(rows.shape) for rows in written.layer_inputs] == [(8, 3, 16)] * 3
    expected = mformer.qformer.norm(mformer.query_experts)[written.routing.expert.long().flatten()]
    torch.testing.assert_close(written.layer_inputs[0], expected)
    assert not mformer(states_of(), USERS).layer_inputs


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    weights = TermWeights(contrastive=0.5, matching=2.0, generation=3.0)
    mformer, heads = build(weights)
    values = heads(write(mformer), pairs_of())
    expected = 0.5 * values["contrastive"] + 2 * values["matching"] + 3 * values["generation"]
    torch.testing.assert_close(values["loss"], expected)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_alone_trains_mformer_and_builds_nothing_of_the_others(term: str) -> None:
    mformer, heads = build(TermWeights(**{name: float(name == term) for name in TERMS}))
    values = heads(write(mformer), pairs_of())
    assert values.keys() == {"loss", term} | ({"matching_accuracy"} if term == "matching" else set())
    values["loss"].backward()
    contrastive = {"query_projection", "text_projection", "log_temperature"}
    extra = {"contrastive": contrastive, "matching": {"match"}, "generation": {"decoder"}}
    assert {name.split(".")[0] for name, _ in heads.named_parameters()} == {"text"} | extra[term]
    assert (heads.text.decode_token is not None) == (term == "generation")
    reached = [mformer.router.weight, mformer.query_experts, mformer.state_projection.weight]
    layer = mformer.qformer.blocks[0]
    assert layer.cross_attention is not None
    reached += [layer.cross_attention.key_value.weight, layer.self_attention.qkv.weight, layer.feed_forward.wide.weight]
    reached += [heads.text.token_projection.weight, heads.text.positions]
    for parameter in reached:
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-9


def test_recomputation_changes_neither_loss_nor_gradient() -> None:
    found = []
    for recompute in (False, True):
        mformer, heads = build(recompute=recompute)
        torch.manual_seed(5)
        loss = heads(write(mformer), pairs_of())["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for module in (mformer, heads) for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_token_is_foretold_from_the_queries_and_the_tokens_before_it() -> None:
    mformer, heads = build()
    layer_inputs, group = write(mformer).layer_inputs, torch.tensor([0, 2, 4, 6], dtype=torch.int32)

    def answers(embeds: Tensor, queries: tuple[Tensor, ...]) -> Tensor:
        return heads.text.behind(heads.text.embed(embeds, TEXTS, shifted=True), TEXTS, queries, group)

    embeds = pairs_of().token_embeds
    before = answers(embeds, layer_inputs)
    changed = embeds.clone()
    changed[6] += 1.0  # the third text is rows 4 to 8; row 6 stands for what is known before token 6
    moved = (answers(changed, layer_inputs) - before).abs().amax(dim=1) > 1e-9
    assert moved.tolist() == [False] * 7 + [True, True] + [False] * 2
    other = tuple(torch.cat([rows[:4], rows[4:5] + 1.0, rows[5:]]) for rows in layer_inputs)
    moved = (answers(embeds, other) - before).abs().amax(dim=1) > 1e-9
    assert moved.tolist() == [False] * 4 + [True] * 5 + [False] * 2


def test_negatives_are_the_same_under_the_same_seed() -> None:
    mformer, heads = build(TermWeights(contrastive=0.0, generation=0.0))
    written, pairs = write(mformer), pairs_of()
    losses = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        losses.append(heads(written, pairs)["matching"].item())
    assert losses[0] == losses[1] and len(set(losses)) > 2


def test_a_batch_of_one_has_no_negatives() -> None:
    mformer, heads = build(TermWeights(generation=0.0))
    pairs = pairs_of()
    only = Pairs(pairs.items[:2], USERS[:2], pairs.input_ids[:1], pairs.token_embeds[:1], TEXTS[:2])
    values = heads(mformer(states_of()[:2], USERS[:2]), only)
    assert bool(torch.isfinite(values["loss"])) and float(values["matching_accuracy"]) in (0.0, 1.0)


def test_texts_do_not_see_each_other() -> None:
    _, heads = build()
    tokens = pairs_of().token_embeds[:7]
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    both, alone = (
        heads.text_features(heads.text.embed(rows, cu_seqlens), cu_seqlens)
        for rows, cu_seqlens in zip((tokens, tokens[3:]), bounds, strict=True)
    )
    torch.testing.assert_close(both[1:], alone)


def test_an_empty_batch_has_no_contrastive_loss() -> None:
    assert float(contrastive_loss(torch.zeros(0, 2, 4), torch.zeros(0, 4), 0.07)) == 0.0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one at least must be above 0, got contrastive 0, matching 0, generation 0"):
        TermWeights(0, 0, 0)
    with pytest.raises(ValueError, match="weights must not be negative .* got contrastive -1"):
        TermWeights(contrastive=-1)
    with pytest.raises(ValueError, match="vocabulary must be given where generation has a weight, got None"):
        PretrainingHeads(build()[0], 5, max_tokens=8, weights=TermWeights())
