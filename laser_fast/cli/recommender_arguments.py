"""Arguments of `laser-fast recommender train` and `import`, and what the second does; light until it does it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from laser_fast.cli.numbers import LARGEST_SEED, whole_number

if TYPE_CHECKING:
    from laser_fast.data import SequenceDataset, Split


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast recommender train DATA OUTPUT ...`."""
    parser.add_argument("data", help="folder written by prepare")
    parser.add_argument("output", help="new folder for the trained recommender")
    parser.add_argument("--kind", choices=("sasrec", "gru4rec"), help="which of them (default: what the config says)")
    parser.add_argument("--config", help="YAML file with settings of the recommender")
    parser.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, help="of weights, batches and folds (default: 0)"
    )
    parser.add_argument(
        "--folds", type=int, metavar="K", help="also K models that have each not seen the users of one fold, for Laser"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT from its last whole state")
    _add_split_arguments(parser)


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast recommender import CHECKPOINT DATA OUTPUT --kind KIND ...`."""
    parser.add_argument("checkpoint", help="its weights: a state_dict in a file of torch, or safetensors")
    parser.add_argument("data", help="folder written by prepare")
    parser.add_argument("output", help="new folder for the recommender")
    parser.add_argument("--kind", required=True, choices=("recbole-sasrec", "recbole-gru4rec", "llara-sasrec"))
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--item-map", metavar="FILE", help="id of each of its indices: JSON, or CSV with index,item_id")
    order.add_argument("--same-order", action="store_true", help="its items are those of the data set, in this order")
    parser.add_argument(
        "--trained-on-this-split", action="store_true", help="it has not seen validation and test events; else no Laser"
    )
    parser.add_argument("--num-heads", type=whole_number(1, 1024), help="attention heads, which weights do not tell")
    parser.add_argument("--activation", help="RecBole's hidden_act (default: gelu)")
    parser.add_argument("--max-length", type=whole_number(1, 2**20), help="longest history of a GRU4Rec (default: 50)")
    _add_split_arguments(parser)


def import_from_arguments(
    parsed: argparse.Namespace, dataset: "SequenceDataset", split: "Split", say: Callable[[str], object]
) -> None:
    """Read the checkpoint, rank the validation rows with it, and save it in `parsed.output`.

    Raises:
        FileExistsError: the output exists.
        FileNotFoundError, ValueError: see `claim`, `import_recommender` and `read_item_map`.
    """
    from laser_fast.files.claims import claim

    with claim(parsed.output):
        _import(parsed, dataset, split, say)


def _import(
    parsed: argparse.Namespace, dataset: "SequenceDataset", split: "Split", say: Callable[[str], object]
) -> None:
    from laser_fast.evaluation import evaluate, table
    from laser_fast.recommenders.importers.checkpoints import import_recommender
    from laser_fast.recommenders.importers.item_map import read_item_map
    from laser_fast.recommenders.recommender_files import save_recommender

    output = Path(parsed.output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"recommender import: output must be a new folder, got {parsed.output!r}")
    model, report = import_recommender(
        parsed.checkpoint,
        parsed.kind,
        dataset.items,
        item_map=read_item_map(parsed.item_map) if parsed.item_map else None,
        same_order=parsed.same_order,
        num_heads=parsed.num_heads,
        activation=parsed.activation,
        max_length=parsed.max_length,
    )
    say(str(report))
    if parsed.trained_on_this_split:
        model.split_hash = split.hash
    else:
        say("on which split it was trained is unknown: Laser's training refuses it without --trained-on-this-split")
    if len(split.valid):
        say(table({f"{parsed.kind}, validation": evaluate(model, split.valid)}, ("HR@10", "NDCG@10", "MRR")))
    save_recommender(model, output, imported=report.to_dict())
    say(f"saved in {parsed.output}")


def _add_split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="KIND", help="leave-one-out (default), global-time, ...")
    parser.add_argument(
        "--split-set", action="append", default=[], metavar="KEY=VALUE", help="e.g. --split-set test_from=2024-01-31"
    )
