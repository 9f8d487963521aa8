"""`laser-fast recommend`: items for users of the data set, or for a history of item ids."""

import argparse
import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from laser_fast.cli.arguments import whole_number
from laser_fast.cli.runs import add_run, load_run
from laser_fast.config import resolve_path
from laser_fast.data import ItemText
from laser_fast.printable import printable, shorten

if TYPE_CHECKING:
    from laser_fast.laser import LaserModel

_LONGEST_TITLE = 300  # characters of it that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast recommend RUN`."""
    add_run(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--history", nargs="+", metavar="ITEM", help="item ids of anybody, oldest first")
    who.add_argument("--user", nargs="+", metavar="USER", help="users of the data set")
    who.add_argument("--sample", type=whole_number(1), default=3, metavar="N", help="N of its users (default: 3)")
    parser.add_argument("-k", type=whole_number(1), default=5, help="items to recommend")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--json", action="store_true", help="one JSON object per user")


def run(parsed: argparse.Namespace) -> None:
    """Print what is recommended, as words or as JSON."""
    from laser_fast.laser.laser_files import origin_of

    if parsed.history is not None:  # needs no data set
        model, asked = _load_alone(parsed), [("the history given", parsed.history)]
    else:
        model, inputs, _ = load_run(parsed, parsed.model)
        dataset = inputs.dataset
        asked = [
            (f"user {dataset.user_ids[index]}", [dataset.items.ids[item] for item in dataset.sequence(index)])
            for index in _user_indices(dataset.user_ids, parsed)
        ]
    answers = model.recommend([history for _, history in asked], parsed.k, exclude_seen=not parsed.include_seen)
    origin = origin_of(model)
    texts = ItemText(origin.config.prompt.item_template).render(origin.items)
    titles = dict(zip(model.item_ids, texts, strict=True))
    for (user, history), answer in zip(asked, answers, strict=True):
        if parsed.json:
            items = [{"item": r.item_id, "score": r.score, "text": titles[r.item_id]} for r in answer]
            print(json.dumps({"user": user, "history": history, "recommendations": items}))
            continue
        newest = [_shown(titles.get(item, item)) for item in history[-5:]]
        print(f"\n{_shown(user)}, {len(history)} items, the newest last:")
        print(textwrap.fill("; ".join(newest), 100, initial_indent="    ", subsequent_indent="    "))
        print("  recommended:")
        for rank, recommendation in enumerate(answer, start=1):
            print(f"    {rank}. {_shown(titles[recommendation.item_id])}  ({recommendation.score:.2f})")


def _shown(text: str) -> str:
    """Text of data for a line of a terminal."""
    return printable(shorten(text, _LONGEST_TITLE))


def _load_alone(parsed: argparse.Namespace) -> "LaserModel":
    """The model of a run or a folder of `save_pretrained`, for which no data set is needed."""
    from laser_fast.laser import LaserModel
    from laser_fast.laser.laser_files import find_saved

    if find_saved(resolve_path(parsed.model, "RUN")) is None:
        raise FileNotFoundError(f"recommend: the folder must hold a run or a saved Laser, got {parsed.model!r}")
    return LaserModel.from_pretrained(parsed.model, recommender=parsed.recommender, llm=parsed.llm)


def _user_indices(user_ids: Sequence[str], parsed: argparse.Namespace) -> list[int]:
    if parsed.user is None:
        sample = min(parsed.sample, len(user_ids))
        return [round(i * len(user_ids) / sample) for i in range(sample)]
    index = {user: position for position, user in enumerate(user_ids)}
    for user in parsed.user:
        if user not in index:
            raise ValueError(f"recommend: --user must name users of the data set, got {user!r}")
    return [index[user] for user in parsed.user]
