"""Token sequences of histories, packed, put together from item texts that were tokenised once.

Every item text is tokenised on its own before training; a batch of prompts is then a gather of integers: no text is
touched and no Python loop runs over users or items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from laser_fast.data.sequences import PackedSequences, check_range, cu_seqlens_of, segment_positions

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer, or whatever returns {"input_ids": ...} as it does."""

_PLACEHOLDERS = ("{history}", "{text}")
_WORD = "films"
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class TokenizedTexts:
    """Tokens of I texts, int32 [n], and offsets, int64 [I+1]: text i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if self.input_ids.dtype != np.int32 or self.offsets.dtype != np.int64:
            raise TypeError(
                "TokenizedTexts: input_ids must be int32 and offsets int64, "
                f"got {self.input_ids.dtype} and {self.offsets.dtype}"
            )
        if not self.offsets.size or self.offsets[0] != 0 or self.offsets[-1] != len(self.input_ids):
            raise ValueError(f"TokenizedTexts: offsets must run from 0 to {len(self.input_ids)}, got {self.offsets}")
        if (np.diff(self.offsets) < 0).any():
            raise ValueError("TokenizedTexts: offsets must not fall, got a fall")

    def __len__(self) -> int:
        return len(self.offsets) - 1


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def words_carry_space(tokenizer: Tokenizer) -> bool:
    """Whether the space before a word is part of the word's tokens (byte-level BPE: GPT-2, Llama 3, Qwen).

    Texts are then tokenised with a space in front, and the words around them end without theirs, so that the pieces
    give the tokens of the whole.
    """
    joined, first = _ids(tokenizer, "one two"), _ids(tokenizer, "one")
    return joined == first + _ids(tokenizer, " two") and joined != first + _ids(tokenizer, "two")


def _ids_behind_a_word(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of `text` in the midst of a text, where SentencePiece puts no space in front of it."""
    word = _ids(tokenizer, _WORD)
    both = _ids(tokenizer, _WORD + text)
    return both[len(word) :] if both[: len(word)] == word else _ids(tokenizer, text)


def _as_text(tokenizer: Tokenizer) -> dict[str, bool]:
    """Options with which a tokenizer of Hugging Face finds no special token in a text."""
    if not hasattr(tokenizer, "split_special_tokens"):
        return {}
    try:
        tokenizer(_WORD, add_special_tokens=False, split_special_tokens=True)
    except ValueError:  # mistral-common's finds none in any case, and refuses to be told so
        return {}
    return {"split_special_tokens": True}


def tokenize_texts(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> TokenizedTexts:
    """Tokens of every text without special tokens, the first `max_tokens` of each.

    A text that spells a special token, such as "</s>" or "<|im_end|>", is read as the characters it is made of: what
    somebody typed cannot end a prompt. In the words of `prompt_layout`, which are ours, special tokens are themselves.

    Args:
        texts: I texts; "" has no tokens.
        max_tokens: of a text; None = no limit.

    Raises:
        ValueError: `max_tokens` is smaller than 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"tokenize_texts: max_tokens must be at least 1, got {max_tokens}")
    # the tokenizer cuts, not we: it warns about texts longer than the model otherwise
    options: dict[str, Any] = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    options |= _as_text(tokenizer)
    front = " " if words_carry_space(tokenizer) else ""
    pieces: list[np.ndarray] = []
    lengths = np.zeros(len(texts), dtype=np.int64)
    filled = [index for index, text in enumerate(texts) if text]
    for start in range(0, len(filled), _TEXTS_AT_ONCE):
        rows = filled[start : start + _TEXTS_AT_ONCE]
        encoded = tokenizer([front + texts[row] for row in rows], add_special_tokens=False, **options)["input_ids"]
        lengths[rows] = [len(ids) for ids in encoded]
        pieces += [np.asarray(ids, dtype=np.int32) for ids in encoded]
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return TokenizedTexts(np.concatenate([np.zeros(0, dtype=np.int32), *pieces]), offsets)


@dataclass(frozen=True)
class PromptLayout:
    """What stands around and between the item texts of a prompt.

    Args:
        left: token ids before the items: the tokenizer's special tokens, then the instruction.
        right: token ids after the items: the closing words, then the tokenizer's special tokens.
        separator: token ids between two items.
        newest_first: the newest item stands first; False: last.
        max_items: at most this many newest items.
        max_tokens: at most this many tokens between `left` and `right`, separators included; the oldest items are
            left out first, and a newest item that is longer is cut.

    Raises:
        ValueError: `max_items` or `max_tokens` is smaller than 1.
    """

    left: list[int]
    right: list[int]
    separator: list[int]
    newest_first: bool = True
    max_items: int = 10
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_items < 1 or self.max_tokens < 1:
            raise ValueError(
                f"PromptLayout: max_items and max_tokens must be at least 1, got {self.max_items} and {self.max_tokens}"
            )


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer sets before and after a single text, found by comparing a word's tokens with and
    without them; both empty if it has none.

    Raises:
        ValueError: the word's tokens are not found between the special ones.
    """
    bare, whole = _ids(tokenizer, _WORD), list(tokenizer(_WORD)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ValueError(
        f"special_tokens: a text's tokens must stand unchanged between the special tokens, got {whole} for {bare}"
    )


def prompt_layout(
    template: str,
    tokenizer: Tokenizer,
    *,
    separator: str = "; ",
    newest_first: bool = True,
    max_items: int = 10,
    max_tokens: int = 256,
) -> PromptLayout:
    """The layout of a prompt template such as "Films watched, newest first: {history}".

    The words before, between and after the items are tokenised by themselves, as the items are, so that the pieces
    give the tokens of the whole with WordPiece, byte-level BPE and SentencePiece.

    Args:
        template: words around one `{history}` (or `{text}`, for a single item).
        separator: text between two items.
        newest_first, max_items, max_tokens: see `PromptLayout`.

    Raises:
        ValueError: the template does not have exactly one placeholder, or a limit is smaller than 1.
    """
    found = [name for name in _PLACEHOLDERS if name in template]
    if len(found) != 1 or template.count(found[0]) != 1:
        raise ValueError(f"prompt_layout: the template must have one {' or '.join(_PLACEHOLDERS)}, got {template!r}")
    before, after = template.split(found[0])
    left, right = special_tokens(tokenizer)
    # a word may have the tokens on its own that it has behind another: WordPiece drops spaces, and SentencePiece puts
    # one in front of every text (Llama 2, Mistral)
    alike = _ids(tokenizer, "one two") == _ids(tokenizer, "one") + _ids(tokenizer, "two")
    if alike or words_carry_space(tokenizer):
        before, separator = before.removesuffix(" "), separator.removesuffix(" ")
    return PromptLayout(
        left=left + _ids(tokenizer, before),
        right=_ids_behind_a_word(tokenizer, after) + right,
        separator=_ids_behind_a_word(tokenizer, separator),
        newest_first=newest_first,
        max_items=max_items,
        max_tokens=max_tokens,
    )


def _newest_that_fit(
    histories: PackedSequences, texts: TokenizedTexts, layout: PromptLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items that enter the prompts, per user newest first: start and length of each text, and items per user [B]."""
    check_range(histories.items, len(texts), "TokenizedTexts: item indices")
    recent = histories.truncate_left(layout.max_items)
    users = np.repeat(np.arange(len(recent), dtype=np.int64), recent.lengths)
    # mirrored inside every user: newest first
    items = recent.items[recent.cu_seqlens[:-1][users] + recent.cu_seqlens[1:][users] - 1 - np.arange(len(users))]
    starts = texts.offsets[items]
    lengths = texts.offsets[items + 1] - starts
    told = lengths > 0
    users, starts, lengths = users[told], starts[told], lengths[told]
    counts = np.bincount(users, minlength=len(recent))
    firsts = np.cumsum(counts) - counts
    # tokens up to and including each item, with one separator before every item but the newest
    running = np.cumsum(lengths + len(layout.separator))
    before_user = (running - lengths - len(layout.separator))[firsts[users]]
    spent = running - before_user - len(layout.separator)
    newest = np.zeros(len(users), dtype=bool)
    newest[firsts[counts > 0]] = True
    lengths = np.where(newest, np.minimum(lengths, layout.max_tokens), lengths)
    fits = newest | (spent <= layout.max_tokens)
    return starts[fits], lengths[fits], np.bincount(users[fits], minlength=len(recent))


def prompt_lengths(histories: PackedSequences, texts: TokenizedTexts, layout: PromptLayout) -> np.ndarray:
    """Tokens that `history_tokens` gives every history: int64 [B]."""
    _, lengths, counts = _newest_that_fit(histories, texts, layout)
    users = np.repeat(np.arange(len(counts)), counts)
    told = np.bincount(users, weights=lengths, minlength=len(counts)).astype(np.int64)
    separators = np.maximum(counts - 1, 0) * len(layout.separator)
    return np.asarray(told + separators + len(layout.left) + len(layout.right))


def history_tokens(
    histories: PackedSequences, texts: TokenizedTexts, layout: PromptLayout
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of B histories (oldest first), packed: `left`, the item texts with separators between them, `right`.

    Items without tokens are passed over; an empty history gives `left + right`.

    Returns:
        input_ids int64 [T] and cu_seqlens int32 [B+1].

    Raises:
        ValueError: an item index is out of range.
    """
    starts, lengths, counts = _newest_that_fit(histories, texts, layout)
    users = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    firsts = np.cumsum(counts) - counts
    if not layout.newest_first:
        mirrored = firsts[users] + counts[users] - 1 - (np.arange(len(users)) - firsts[users])
        starts, lengths = starts[mirrored], lengths[mirrored]
    separated = np.ones(len(users), dtype=bool)
    separated[firsts[counts > 0]] = False  # no separator before a user's first item
    widths = lengths + separated * len(layout.separator)
    middle = np.zeros(len(counts), dtype=np.int64)
    np.add.at(middle, users, widths)
    cu_seqlens = cu_seqlens_of(middle + len(layout.left) + len(layout.right))
    input_ids = np.empty(int(cu_seqlens[-1]), dtype=np.int64)
    # every item's place: its user's start, the words on the left, and what its user's earlier items took
    taken = np.cumsum(widths) - widths
    places = cu_seqlens[:-1][users] + len(layout.left) + taken - taken[firsts[users]]
    input_ids[cu_seqlens[:-1, None] + np.arange(len(layout.left))] = layout.left
    input_ids[cu_seqlens[1:, None] - len(layout.right) + np.arange(len(layout.right))] = layout.right
    input_ids[places[separated, None] + np.arange(len(layout.separator))] = layout.separator
    texts_at = segment_positions(places + widths - lengths, lengths)
    input_ids[texts_at] = texts.input_ids[segment_positions(starts, lengths)]
    return input_ids, cu_seqlens
