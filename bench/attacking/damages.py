"""Files damaged at random: what is read then is refused by name, or is exactly what was written.

Lost is: another answer, an error of another kind or that names neither folder nor file, a process that dies or hangs.
"""

import hashlib
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attacking.attack import Scope
from attacking.children import Findings, Trial, ask, done

TITLE = "damages"
_MOST_BYTES = 4 * 2**30  # that a reader may take beyond what its process has: a damaged number must not fill the memory
_NUMBERS = (0, -1, 1, 2, 3, 7, 10**6, 10**12, 0.5, 1e300)


@dataclass(frozen=True)
class Target:
    """Something that is read.

    Attributes:
        whole: its folder.
        other: a folder of the same kind, made with another seed; files in the same place can be swapped.
        read: a folder -> what it gives, in words or numbers.
        times: how often it is damaged.
        right: what a damaged one may give; None = what the whole one gives.
    """

    name: str
    whole: Path
    other: Path
    read: Callable[[Path], Any]
    times: int
    right: Callable[[Path], list[Any]] | None = None


def attack(scope: Scope) -> None:
    """A line for every kind of folder."""
    scope.divide(len(targets := _targets(scope)))
    for target in targets:
        right = ask(lambda target=target: _right(target, scope.folder / "whole"), scope.folder)
        what = f"{target.name}: a file cut, deleted, swapped for another's, a bit, a block or a JSON value changed"
        scope.try_all(target.name, what, _trials(scope, target, right))


def _right(target: Target, place: Path) -> list[Any]:
    shutil.copytree(target.whole, place)  # reading may write: put back what belongs to a state
    found = [target.read(place)] if target.right is None else target.right(place)
    shutil.rmtree(place)
    return found


def _targets(scope: Scope) -> list[Target]:
    world, histories = scope.world, scope.world.histories()
    data, folds = world.data, world.recommender()
    twin = 0 if scope.rehearse else 1  # what is swapped is of another seed, and in a rehearsal not swapped
    other_data = scope.place("other-data") / "data"
    log, items = world.sources
    done(["prepare", other_data, "--interactions", log, "--items", items, "--max-history", "5"], scope.folder)
    return [
        Target("a saved Laser", world.saved(), world.saved(twin), lambda place: _saved_answers(place, histories), 150),
        Target("a run", world.run(), world.run(twin), lambda place: _run_answers(place, histories), 100),
        Target("a recommender with folds", folds, world.recommender(twin), _states, 150),
        Target("a data set", data, other_data, _data_hash, 150),
        Target("states of a run", world.stopped(), world.stopped(twin), _newest_state, 100, _both_states),
    ]


def _trials(scope: Scope, target: Target, right: list[Any]) -> Iterator[Trial]:
    for number in range(scope.times(target.times)):
        drawn = scope.random(TITLE, target.name, number)
        place = scope.folder / f"{target.name}-{number}".replace(" ", "-")
        yield lambda findings, drawn=drawn, place=place: _try(findings, target, right, drawn, place)


def _try(findings: Findings, target: Target, right: list[Any], drawn: random.Random, place: Path) -> None:
    shutil.copytree(target.whole, place)
    names = {path.name for path in place.rglob("*") if path.is_file()} | {place.name}
    name, how = damage(drawn, place, target.other)
    told = f"{target.name}, {name}, {how}"
    _bound_memory()
    try:
        found = target.read(place)
    except (ValueError, FileNotFoundError) as error:
        named = any(file in str(error) for file in names)
        findings.saw("refused" if named else "refused without a name")
        if not named:
            findings.lose(f"{told}: {type(error).__name__} names no place: {str(error)[:200]}")
    except BaseException as error:
        findings.saw("failed")
        findings.lose(f"{told}: {type(error).__name__}: {str(error)[:200]}")
    else:
        alike = json.loads(json.dumps(found)) in right
        findings.saw("exactly as written" if alike else "otherwise")
        if not alike:
            findings.lose(f"{told}: is read, and answers otherwise")
    shutil.rmtree(place)


def _bound_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_BYTES, resource.RLIM_INFINITY))


def damage(drawn: random.Random, place: Path, other: Path) -> tuple[str, str]:
    """Change one file of a folder, really; its name and how it was changed."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    while True:
        path = drawn.choice(files)
        name, content = str(path.relative_to(place)), path.read_bytes()
        kind = drawn.choice(["bit", "bit", "cut", "zeros", "deleted", "swapped", "JSON", "JSON"])
        if kind == "deleted":
            path.unlink()
            return name, kind
        if kind == "swapped":
            twin = other / name
            changed, how = (twin.read_bytes() if twin.is_file() else content), "swapped for another's"
        elif kind == "JSON":
            changed, how = _edited(drawn, content) if path.suffix == ".json" else (content, "")
        else:
            changed, how = _broken(drawn, content, kind)
        if changed != content:
            path.unlink()  # of a hard link the other stays as it is
            path.write_bytes(changed)
            return name, how


def _broken(drawn: random.Random, content: bytes, kind: str) -> tuple[bytes, str]:
    at = drawn.randrange(len(content))
    changed = bytearray(content)
    if kind == "cut":
        return content[:at], f"cut at byte {at}"
    if kind == "zeros":
        length = min(len(content) - at, drawn.choice((8, 64, 512)))
        changed[at : at + length] = bytes(length)
        return bytes(changed), f"{length} zeros from byte {at}"
    changed[at] ^= 1 << (bit := drawn.randrange(8))
    return bytes(changed), f"bit {bit} of byte {at} flipped"


def _edited(drawn: random.Random, content: bytes) -> tuple[bytes, str]:
    """JSON in which one value is another, or is missing."""
    values = json.loads(content)
    inner, path = values, list[str]()
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            return content, ""
        key = drawn.choice(keys)
        path.append(str(key))
        if not (isinstance(inner[key], (dict, list)) and inner[key] and drawn.random() < 0.9):
            break
        inner = inner[key]
    if drawn.random() < 0.2:
        del inner[key]
        return json.dumps(values).encode(), f"{'.'.join(path)} deleted"
    inner[key] = _another(drawn, inner[key])
    return json.dumps(values).encode(), f"{'.'.join(path)} = {json.dumps(inner[key])[:60]}"


def _another(drawn: random.Random, value: Any) -> Any:
    choices: list[Any] = [None, [], {}, "x", drawn.choice(_NUMBERS)]
    if isinstance(value, bool):
        choices = [not value]
    elif isinstance(value, int | float):
        choices += [value + 1, value * 2, -value]
    elif isinstance(value, str):
        choices += [value + "x", value[:-1], value[::-1]]
    elif isinstance(value, list):
        choices += [value[:-1], value[::-1]]
    return drawn.choice(choices)


def _saved_answers(place: Path, histories: list[list[str]]) -> list[str]:
    from laser_fast import LaserModel

    return _answers(LaserModel.from_pretrained(place), histories)


def _run_answers(place: Path, histories: list[list[str]]) -> list[str]:
    from laser_fast.runs.checkpoint import Run

    return _answers(Run.load(place).model, histories)


def _answers(model: Any, histories: list[list[str]]) -> list[str]:
    """Digests of what it recommends, scores and makes of users."""
    import torch

    from laser_fast.data.sequences import PackedSequences

    packed = PackedSequences.from_lists([[model.index_of_item[item] for item in history] for history in histories])
    scores = model.score(torch.from_numpy(packed.items), torch.from_numpy(packed.cu_seqlens))
    best = [[(one.item_id, one.score) for one in answer] for answer in model.recommend(histories, 5)]
    return [_digest(repr(best).encode()), _digest(scores.numpy().tobytes()), *_tensors([model.encode_users(packed)])]


def _states(place: Path) -> list[str]:
    """Digests of the states that a recommender and its folds give, and of its scores."""
    import torch

    from laser_fast.recommenders.recommender_files import load_recommender

    model = load_recommender(place)
    items, cu_seqlens = torch.arange(15) % model.num_items, torch.tensor([0, 3, 8, 15], dtype=torch.int32)
    folds, of_users = model.cross_fitted, list[int]()
    with torch.no_grad():
        found = [model.states(items, cu_seqlens), model.score(items, cu_seqlens)]
        if folds is not None:
            found += [model.fold_states(items, cu_seqlens, fold) for fold in range(len(folds))]
            of_users = folds.of_users(np.arange(30)).tolist()
    return [*_tensors(found), str(model.split_hash), str(model.item_map_hash), str(of_users)]


def _data_hash(place: Path) -> str:
    from laser_fast.data import SequenceDataset

    return SequenceDataset.load(place).hash()


def _newest_state(place: Path) -> list[Any]:
    """Digests of the state that a run would go on from, and of the log and the best model that belong to it."""
    import warnings

    from laser_fast.config import LaserConfig, load_config
    from laser_fast.runs.run_directory import RunDirectory

    config = load_config(LaserConfig, place / "config.yaml")
    states = RunDirectory(place, config, resume=True).states
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = states.newest()
    if state is None:
        raise ValueError(f"no state is left in {place.name}")
    states.put_back_files()
    files = [place / "metrics.jsonl", *sorted((place / "checkpoint").iterdir())]
    files = [path for path in files if path.suffix != ".md"]  # a text for people, who may change it
    contents = [f"{path.name} {_digest(path.read_bytes())}" for path in files]
    return [json.dumps(state.values), *_tensors(list(state.tensors.values())), *contents]


def _both_states(place: Path) -> list[Any]:
    """What the newest state gives, and what the one before it gives, which serves should the newest be damaged."""
    newest = _newest_state(place)
    shutil.rmtree(max((place / "states").iterdir()))
    return [newest, _newest_state(place)]


def _tensors(found: list[Any]) -> list[str]:
    return [_digest(one.cpu().numpy().tobytes()) for one in found]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
