"""Token embeddings in host memory: they stay there, and look up what the model's own table looks up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.embedding_tables import HostEmbedding

from ..families import random_model

NAMES = ("llama", "gemma2", "bert")  # gemma2 scales its embeddings, bert keeps its table one module further down
IDS = torch.tensor([4, 60, 0, 4])


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = random_model(name)
    hosted = copy.deepcopy(plain)
    hosted.set_input_embeddings(HostEmbedding(hosted.get_input_embeddings()))
    return plain, hosted


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_states_are_those_of_the_plain_model(name: str) -> None:
    plain, hosted = (FrozenLM(model) for model in pair(name))
    assert torch.equal(hosted.embed(IDS), plain.embed(IDS))
    assert hosted.embedding_rms == plain.embedding_rms and hosted.dtype == plain.dtype
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert torch.equal(hosted(hosted.embed(IDS), cu_seqlens), plain(plain.embed(IDS), cu_seqlens))


def test_a_scaled_embedding_keeps_its_scale() -> None:
    _, hosted = pair("gemma2")
    unscaled = F.embedding(IDS, hosted.get_input_embeddings().weight)
    torch.testing.assert_close(FrozenLM(hosted).embed(IDS), unscaled * 32**0.5)


@pytest.mark.parametrize("name", NAMES)
def test_moving_the_model_leaves_the_table_and_embed_follows_the_layers(name: str) -> None:
    lm = FrozenLM(pair(name)[1])
    outer = torch.nn.ModuleDict({"lm": lm}).to("meta")
    table = lm.model.get_input_embeddings().weight
    assert table.device.type == "cpu" and table.abs().sum() > 0
    others = [parameter for parameter in outer.parameters() if parameter is not table]
    assert others and all(parameter.is_meta for parameter in others)
    assert lm.device.type == "meta"
    assert lm.embed(IDS).is_meta and lm.embed(IDS).shape == (4, 32)


def test_casting_the_model_leaves_the_dtype_of_the_table() -> None:
    _, hosted = pair("llama")
    hosted.bfloat16()
    assert hosted.get_input_embeddings().weight.dtype == torch.float32
    assert hosted.norm.weight.dtype == torch.bfloat16


@pytest.mark.gpu
def test_on_a_gpu_the_layers_move_and_the_table_stays() -> None:
    plain, hosted = pair("gemma2")
    expected = FrozenLM(plain)
    lm = FrozenLM(hosted).cuda()
    assert lm.device.type == "cuda" and lm.model.get_input_embeddings().weight.device.type == "cpu"
    embedded = lm.embed(IDS.cuda())
    assert embedded.is_cuda and torch.equal(embedded.cpu(), expected.embed(IDS))
    assert lm.embed(IDS).is_cuda
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    states = lm(embedded, cu_seqlens.cuda()).cpu()
    # float32 on both sides, sums in another order
    torch.testing.assert_close(states, expected(expected.embed(IDS), cu_seqlens), rtol=1e-3, atol=1e-3)
