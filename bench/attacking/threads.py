"""One model asked from many threads at once: every answer is, bit by bit, that of one thread.

Lost is: another answer, an error, a model that is in another mode afterwards, and threads that wait for ever.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from attacking.attack import Scope
from attacking.children import Findings, Trial
from attacking.world import World, model

_THREADS = 16
_ANSWERS = 640  # of every call
_SLOTS = 8  # kept prefixes, for forty users
_TURN_S = 1e-5  # of a thread, so that they meet inside of what they must not meet in
_PATIENCE_S = 180.0
_DEEP = {"prefix_mode": "kv", "readout": "suffix", "dropout": 0.1}
How = tuple[str, dict[str, Any], int, bool]  # language model, settings, kept prefixes, whether in training mode
_MODELS: dict[str, How] = {
    "in evaluation mode": ("bert", {}, 0, False),
    "in training mode": ("bert", {}, 0, True),
    "with a prefix of keys and values": ("llama", {"bituning": _DEEP}, 0, False),
    "that keeps prefixes of fewer users than ask": ("llama", {"bituning": _DEEP}, _SLOTS, False),
}

Call = Callable[[int], Any]  # a user -> the answer


def attack(scope: Scope) -> None:
    """A line for every model."""
    scope.divide(len(_MODELS))
    for name, how in list(_MODELS.items())[-scope.times(len(_MODELS)) :]:
        what = f"a model {name}, asked by {_THREADS} threads"
        scope.try_all(name, what, _trials(scope, how), patience=_PATIENCE_S)


def _trials(scope: Scope, how: How) -> Iterator[Trial]:
    world = scope.world
    world.language_model(how[0])
    world.configuration  # noqa: B018 made before the trials, which would each make it
    names = list(_CALLS)  # the last one has all of them in it
    for name in names[-1:] if scope.rehearse else names:
        yield lambda findings, name=name: _try(findings, world, how, name, scope.times(_ANSWERS))


def _try(findings: Findings, world: World, how: How, name: str, answers: int) -> None:
    kind, settings, slots, training = how
    # in a forked process torch makes its pool anew at the first call of any new thread, and several at once meet none
    torch.set_num_threads(torch.get_num_threads())
    made = model(world, kind, **settings)
    histories = world.histories()
    if slots:
        made.keep_prefixes(slots)
    made.train(training)
    call = _CALLS[name](made, histories)
    right = [call(user) for user in range(len(histories))]
    users = [number % len(histories) for number in range(answers)]
    sys.setswitchinterval(_TURN_S)
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = [pool.submit(call, user) for user in users]
        wrong, first = 0, ""
        for user, answer in zip(users, waiting, strict=True):
            try:
                fault = "" if answer.result() == right[user] else "another answer"
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:200]}"
            wrong += bool(fault)
            first = first or fault
    findings.saw("alike", answers - wrong)
    if wrong:
        findings.saw("otherwise", wrong)
        findings.lose(f"{name}: {wrong} of {answers} answers, the first: {first}", wrong)
    if made.training != training:
        findings.lose(f"{name}: the model was {'' if training else 'not '}in training mode, and is not as it was")


def _recommend(made: Any, histories: list[list[str]]) -> Call:
    return lambda user: [(one.item_id, one.score) for one in made.recommend([histories[user]], 5)[0]]


def _score(made: Any, histories: list[list[str]]) -> Call:
    packed = _packed(made, histories)
    return lambda user: made.score(*_tensors(packed[user])).numpy().tobytes()


def _search(made: Any, histories: list[list[str]]) -> Call:
    packed = _packed(made, histories)
    return lambda user: [one.numpy().tobytes() for one in made.index().search(packed[user], 5, exclude_seen=True)]


def _encode_users(made: Any, histories: list[list[str]]) -> Call:
    packed = _packed(made, histories)
    return lambda user: made.encode_users(packed[user]).numpy().tobytes()


def _encode_items(made: Any, histories: list[list[str]]) -> Call:
    return lambda user: made.encode_items([user % made.num_items]).numpy().tobytes()


def _everything(made: Any, histories: list[list[str]]) -> Call:
    calls = [make(made, histories) for make in (_recommend, _score, _search, _encode_users, _encode_items)]
    return lambda user: calls[user % len(calls)](user)


_CALLS: dict[str, Callable[[Any, list[list[str]]], Call]] = {
    "recommend": _recommend,
    "score": _score,
    "index().search": _search,
    "encode_users": _encode_users,
    "encode_items": _encode_items,
    "all of them in turn": _everything,
}


def _packed(made: Any, histories: list[list[str]]) -> list[Any]:
    from laser_fast.data.sequences import PackedSequences

    return [PackedSequences.from_lists([[made.index_of_item[item] for item in one]]) for one in histories]


def _tensors(packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(packed.items.astype(np.int64)), torch.from_numpy(packed.cu_seqlens)
