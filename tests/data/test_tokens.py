"""Packed prompts against a loop over users, and the layout that a tokenizer and a template give."""

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_fast.data import (
    PackedSequences,
    PromptLayout,
    TokenizedTexts,
    history_tokens,
    prompt_layout,
    tokenize_texts,
    tokens,
)
from laser_fast.data.tokens import special_tokens, words_carry_space

TEXTS = [[1, 2], [3], [], [4, 5, 6, 7], [8]]


def pack(texts: list[list[int]]) -> TokenizedTexts:
    offsets = np.cumsum([0] + [len(text) for text in texts]).astype(np.int64)
    return TokenizedTexts(np.array([token for text in texts for token in text], dtype=np.int32), offsets)


def layout(**changes: Any) -> PromptLayout:
    return PromptLayout(**{"left": [90, 91], "right": [99], "separator": [70], **changes})


def prompt_by_loop(history: list[int], texts: list[list[int]], layout: PromptLayout) -> list[int]:
    """One user's prompt as one would write it in words."""
    told: list[list[int]] = []
    spent = 0
    for item in reversed(history[max(len(history) - layout.max_items, 0) :]):
        if not texts[item]:
            continue
        cost = len(texts[item]) + (len(layout.separator) if told else 0)
        if not told:
            told.append(texts[item][: layout.max_tokens])
        elif spent + cost <= layout.max_tokens:
            told.append(texts[item])
        else:
            break
        spent += cost
    if not layout.newest_first:
        told.reverse()
    middle: list[int] = []
    for position, text in enumerate(told):
        middle += (layout.separator if position else []) + text
    return layout.left + middle + layout.right


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], PromptLayout]:
    texts = draw(st.lists(st.lists(st.integers(0, 60), max_size=5), min_size=1, max_size=6))
    histories = draw(st.lists(st.lists(st.integers(0, len(texts) - 1), max_size=7), max_size=5))
    around = st.lists(st.integers(61, 99), max_size=3)
    chosen = PromptLayout(
        draw(around), draw(around), draw(around), draw(st.booleans()), draw(st.integers(1, 6)), draw(st.integers(1, 15))
    )
    return texts, histories, chosen


@given(prompts())
@settings(max_examples=100, deadline=None, database=None)
def test_equal_to_a_loop_over_users(case: tuple[list[list[int]], list[list[int]], PromptLayout]) -> None:
    texts, histories, chosen = case
    input_ids, cu_seqlens = history_tokens(PackedSequences.from_lists(histories), pack(texts), chosen)
    expected = [prompt_by_loop(history, texts, chosen) for history in histories]
    assert input_ids.tolist() == [token for prompt in expected for token in prompt]
    assert cu_seqlens.tolist() == np.cumsum([0] + [len(prompt) for prompt in expected]).tolist()
    assert input_ids.dtype == np.int64
    assert cu_seqlens.dtype == np.int32


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [90, 91, 8, 70, 4, 5, 6, 7, 70, 1, 2, 99]),
        ({"newest_first": False}, [90, 91, 1, 2, 70, 4, 5, 6, 7, 70, 8, 99]),
        ({"max_items": 2}, [90, 91, 8, 70, 4, 5, 6, 7, 99]),
        ({"max_tokens": 6}, [90, 91, 8, 70, 4, 5, 6, 7, 99]),
        ({"max_tokens": 5}, [90, 91, 8, 99]),
        ({"separator": []}, [90, 91, 8, 4, 5, 6, 7, 1, 2, 99]),
    ],
    ids=["newest first", "oldest first", "two items", "budget fits exactly", "budget one short", "no separator"],
)
def test_one_history_by_hand(changes: dict[str, Any], expected: list[int]) -> None:
    histories = PackedSequences.from_lists([[0, 3, 4]])
    assert history_tokens(histories, pack(TEXTS), layout(**changes))[0].tolist() == expected


def test_a_newest_item_beyond_the_budget_is_cut_and_stands_alone() -> None:
    input_ids, _ = history_tokens(PackedSequences.from_lists([[4, 3]]), pack(TEXTS), layout(max_tokens=3))
    assert input_ids.tolist() == [90, 91, 4, 5, 6, 99]


def test_an_old_item_that_does_not_fit_hides_all_older_ones() -> None:
    input_ids, _ = history_tokens(PackedSequences.from_lists([[4, 3, 1]]), pack(TEXTS), layout(max_tokens=4))
    assert input_ids.tolist() == [90, 91, 3, 99]


def test_empty_history_is_the_prompt_alone_and_no_history_nothing() -> None:
    input_ids, cu_seqlens = history_tokens(PackedSequences.from_lists([[], [2]]), pack(TEXTS), layout())
    assert input_ids.tolist() == [90, 91, 99] * 2
    assert cu_seqlens.tolist() == [0, 3, 6]
    input_ids, cu_seqlens = history_tokens(PackedSequences.from_lists([]), pack(TEXTS), layout())
    assert input_ids.tolist() == []
    assert cu_seqlens.tolist() == [0]


def test_other_users_of_the_batch_change_nothing() -> None:
    histories = PackedSequences.from_lists([[0, 1], [3, 2, 4], [], [1] * 9])
    input_ids, cu_seqlens = history_tokens(histories, pack(TEXTS), layout(max_tokens=7))
    for row in range(4):
        alone, _ = history_tokens(histories.select([row]), pack(TEXTS), layout(max_tokens=7))
        assert input_ids[cu_seqlens[row] : cu_seqlens[row + 1]].tolist() == alone.tolist()


@pytest.mark.parametrize("item", [5, -1])
def test_items_out_of_range_are_named(item: int) -> None:
    with pytest.raises(ValueError, match=rf"item indices must lie in 0..4, got {item}"):
        history_tokens(PackedSequences.from_lists([[0, item]]), pack(TEXTS), layout())


@pytest.mark.parametrize("changes", [{"max_items": 0}, {"max_tokens": 0}])
def test_limits_must_be_positive(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_items and max_tokens must be at least 1, got"):
        layout(**changes)


def test_tokenized_texts_check_their_offsets() -> None:
    with pytest.raises(ValueError, match="offsets must run from 0 to 2"):
        TokenizedTexts(np.zeros(2, dtype=np.int32), np.array([0, 1]))
    with pytest.raises(TypeError, match="input_ids must be int32 and offsets int64, got int64 and int64"):
        TokenizedTexts(np.zeros(2, dtype=np.int64), np.array([0, 2]))


def lines_run(histories: PackedSequences, texts: TokenizedTexts) -> int:
    """Python lines that run while the prompts are made."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        # of this library only: a finaliser of another one may run at any moment
        count += event == "line" and "laser_fast" in frame.f_code.co_filename
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        history_tokens(histories, texts, layout())
    finally:
        sys.settrace(before)
    return count


def test_no_python_loop_over_users_or_items() -> None:
    few, many = PackedSequences.from_lists([[0, 1]]), PackedSequences.from_lists([[0, 1, 3, 4]] * 100)
    assert lines_run(many, pack(TEXTS)) == lines_run(few, pack(TEXTS))


class WordTokenizer:
    """Lower-case words as tokens, numbered as they come, `[CLS]`-like 0 in front and 1 behind."""

    def __init__(self, *, special: bool = True) -> None:
        self.words: dict[str, int] = {}
        self.special = special

    def _one(self, text: str, special: bool, limit: int | None) -> list[int]:
        ids = [self.words.setdefault(word, len(self.words) + 2) for word in text.lower().split()][:limit]
        return [0, *ids, 1] if special and self.special else ids

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, truncation: bool = False, max_length: int = 0
    ) -> dict[str, Any]:
        limit = max_length if truncation else None
        if isinstance(text, str):
            return {"input_ids": self._one(text, add_special_tokens, limit)}
        return {"input_ids": [self._one(entry, add_special_tokens, limit) for entry in text]}


def test_tokenize_texts_cuts_keeps_order_and_passes_over_empty_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_TEXTS_AT_ONCE", 2)
    texts = ["a b c", "", "c", "", "a"]
    tokenizer = WordTokenizer()
    whole = tokenize_texts(texts, tokenizer)
    a, b, c = (tokenizer.words[word] for word in "abc")
    assert whole.input_ids.tolist() == [a, b, c, c, a]
    assert whole.offsets.tolist() == [0, 3, 3, 4, 4, 5]
    assert tokenize_texts(texts, tokenizer, 2).input_ids.tolist() == [a, b, c, a]
    assert tokenize_texts([], tokenizer).offsets.tolist() == [0]
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        tokenize_texts(texts, tokenizer, 0)


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "none"])
def test_layout_from_a_template(special: bool) -> None:
    tokenizer = WordTokenizer(special=special)
    made = prompt_layout("films watched: {history} , what next", tokenizer, separator=" ; ")
    words = tokenizer.words
    assert made.left == [0] * special + [words["films"], words["watched:"]]
    assert made.right == [words[","], words["what"], words["next"]] + [1] * special
    assert made.separator == [words[";"]]
    assert made.newest_first


@pytest.mark.parametrize("template", ["no place", "{history} {history}", "{history} and {text}", "{other}"])
def test_a_template_has_one_place_for_the_items(template: str) -> None:
    with pytest.raises(ValueError, match=r"the template must have one \{history\} or \{text\}, got"):
        prompt_layout(template, WordTokenizer())


def test_special_tokens_must_leave_the_text_as_it_is() -> None:
    def odd(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [5, 6] if not add_special_tokens else [0, 7, 1]}

    with pytest.raises(ValueError, match=r"must stand unchanged between the special tokens, got \[0, 7, 1\] for"):
        special_tokens(odd)


def untrained(kind: str) -> Any:
    """A byte-level tokenizer without merges, or one of words as SentencePiece writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte level":
        alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        inner = Tokenizer(models.BPE(alphabet, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=inner)
    words = ["<unk>", "\u2581", "\u2581Films", "\u2581watched", ":", ";", ".", "\u2581Alien", "\u2581Das", "\u2581Boot"]
    distinct = dict.fromkeys([*words, *"Filmswatched"])
    inner = Tokenizer(models.Unigram([(word, -1.0 - 0.1 * index) for index, word in enumerate(distinct)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte level", "first", "always"])
def test_pieces_give_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = untrained(kind)
    assert words_carry_space(tokenizer) == (kind == "byte level")
    texts = tokenize_texts(["Alien", "Das Boot"], tokenizer)
    made = prompt_layout("Films watched: {history}.", tokenizer)
    input_ids, _ = history_tokens(PackedSequences.from_lists([[0, 1]]), texts, made)
    whole = tokenizer("Films watched: Das Boot; Alien.")["input_ids"]
    assert input_ids.tolist() == whole
    assert kind == "byte level" or not {0, 1} & set(whole)  # no lone space, nothing unknown


# special tokens a tokenizer sets around a text; none of these has a padding token
SPECIAL = {
    "both": ("<s> $A </s>", [1], [2]),
    "beginning": ("<s> $A", [1], []),
    "end": ("$A </s>", [], [2]),
    "none": ("$A", [], []),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_prompts_are_what_the_tokenizer_makes_of_the_whole_text(kind: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    template, before, after = SPECIAL[kind]
    words = ["<unk>", "<s>", "</s>", "films", "watched", ":", ",", "alien", "brazil", "heat", "now", "what"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert tokenizer.pad_token is None
    assert special_tokens(tokenizer) == (before, after)
    titles = ["alien", "brazil heat", "heat"]
    chosen = prompt_layout("films watched: {history} what now", tokenizer, separator=", ", max_tokens=5)
    texts = tokenize_texts(titles, tokenizer)
    input_ids, cu_seqlens = history_tokens(PackedSequences.from_lists([[0, 1, 2], [2], []]), texts, chosen)
    # the oldest item, the last of the list, is left out: "heat , brazil heat" has four tokens, with ", alien" six
    whole = ["films watched: heat, brazil heat what now", "films watched: heat what now", "films watched: what now"]
    expected = [tokenizer(text)["input_ids"] for text in whole]
    assert input_ids.tolist() == [token for prompt in expected for token in prompt]
    assert np.diff(cu_seqlens).tolist() == [len(prompt) for prompt in expected]
    # of an item its first tokens are kept
    short = tokenize_texts(titles, tokenizer, 1)
    assert short.input_ids.tolist() == tokenizer("alien brazil heat", add_special_tokens=False)["input_ids"]


def _tokenizer_of(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    seen = ["films watched red alien", "the boot 2 < | im _ end > / s [ SEP ]"] * 4
    if kind == "wordpiece":
        control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, special_tokens=control)
        around, names = "[CLS] $A [SEP]", {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    elif kind == "sentencepiece":
        control = ["<unk>", "<s>", "</s>"]
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=control)
        around, names = "<s> $A", {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        control = ["<|endoftext|>", "<|im_end|>"]
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        around, names = "$A <|im_end|>", {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    inner.train_from_iterator(seen, trainer)
    inner.add_special_tokens(control)
    numbers = [(token, inner.token_to_id(token)) for token in control if token in around]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece", "byte level"])
def test_a_title_that_spells_a_special_token_is_text(kind: str) -> None:
    tokenizer = _tokenizer_of(kind)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special
    spelt = [str(token) for token in tokenizer.all_special_tokens]
    titles = ["red alien", "the boot 2", *spelt, *(f"red {token} alien" for token in spelt), "".join(spelt)]
    texts = tokenize_texts(titles, tokenizer)
    assert not special & set(texts.input_ids.tolist())
    assert (np.diff(texts.offsets) > 0).all()
    for place, title in enumerate(titles[:2]):  # as ever
        front = " " if words_carry_space(tokenizer) else ""
        assert (
            texts.input_ids[slice(*texts.offsets[place : place + 2])].tolist()
            == tokenizer(front + title, add_special_tokens=False)["input_ids"]
        )
    # cut as text, too
    assert np.diff(tokenize_texts(titles, tokenizer, 2).offsets).max() == 2
    # what we write around the titles keeps its special tokens
    chosen = prompt_layout(f"films watched {spelt[-1]} {{history}}", tokenizer)
    assert tokenizer.all_special_ids[-1] in chosen.left
    left, right = special_tokens(tokenizer)
    assert chosen.left[: len(left)] == left and chosen.right[len(chosen.right) - len(right) :] == right
    assert special & {*left, *right}


def test_a_tokenizer_that_reads_all_as_text_and_refuses_the_option_is_asked_without() -> None:
    class Refusing(WordTokenizer):
        split_special_tokens = False

        def __call__(self, *args: Any, split_special_tokens: bool = False, **options: Any) -> dict[str, Any]:
            if split_special_tokens:
                raise ValueError("does not support split_special_tokens")
            return super().__call__(*args, **options)

    assert (
        tokenize_texts(["a b"], Refusing()).input_ids.tolist()
        == tokenize_texts(["a b"], WordTokenizer()).input_ids.tolist()
    )
