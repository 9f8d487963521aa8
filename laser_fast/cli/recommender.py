"""`laser-fast recommender train` and `import`: the ID-based recommender that M-Former reads."""

import argparse
import sys
from pathlib import Path

from laser_fast.cli.arguments import SEED, add_settings, whole_number
from laser_fast.config import RecommenderConfig, SplitConfig, dump_config, load_config, resolve_path
from laser_fast.data import SequenceDataset, Split, make_split
from laser_fast.files.locks import claim

_METRICS = ("HR@10", "NDCG@10", "MRR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both steps."""
    steps = parser.add_subparsers(required=True, metavar="STEP")
    train = steps.add_parser("train", help="train SASRec or GRU4Rec on the training part of a data set")
    _add_train_arguments(train)
    train.set_defaults(step=_train)
    take = steps.add_parser("import", help="take a recommender that was trained with RecBole or for LLaRA")
    _add_import_arguments(take)
    take.set_defaults(step=_import)


def run(parsed: argparse.Namespace) -> int:
    """Train or import."""
    return int(parsed.step(parsed))


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_data_arguments(parser)
    parser.add_argument("--kind", choices=("sasrec", "gru4rec"), help="which of them (default: what the config says)")
    parser.add_argument("--config", help="YAML file with settings of the recommender")
    parser.add_argument("--seed", type=SEED, default=0, help="of weights, batches and folds (default: 0)")
    parser.add_argument("--folds", type=int, metavar="K", help="also K models, each without the users of one fold")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT from its last state")
    add_settings(parser, "width=128")


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="its weights: a state_dict in a file of torch, or safetensors")
    _add_data_arguments(parser)
    parser.add_argument("--kind", required=True, choices=("recbole-sasrec", "recbole-gru4rec", "llara-sasrec"))
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--item-map", metavar="FILE", help="id of each of its indices: JSON, or CSV with index,item_id")
    order.add_argument("--same-order", action="store_true", help="its items are those of the data set, in this order")
    trusted = "it has not seen validation and test events; Laser needs that"
    parser.add_argument("--trained-on-this-split", action="store_true", help=trusted)
    parser.add_argument("--num-heads", type=whole_number(1, 1024), help="attention heads, which weights do not tell")
    parser.add_argument("--activation", help="RecBole's hidden_act (default: gelu)")
    parser.add_argument("--max-length", type=whole_number(1, 2**20), help="longest history of a GRU4Rec (default: 50)")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="folder written by prepare")
    parser.add_argument("output", help="new folder for the recommender")
    parser.add_argument("--split", metavar="KIND", help="leave-one-out (default), global-time, ...")
    example = "e.g. test_from=2024-01-31"
    parser.add_argument("--split-set", action="append", default=[], metavar="KEY=VALUE", help=example)


def _train(parsed: argparse.Namespace) -> int:
    """Train a recommender and rank the validation rows with it."""
    from laser_fast.evaluation import evaluate, table
    from laser_fast.training.interruption import Interrupted
    from laser_fast.training.recommender.train_recommender import train_recommender

    overrides = [*parsed.set, *([f"kind={parsed.kind}"] if parsed.kind else [])]
    overrides += [] if parsed.folds is None else [f"folds={parsed.folds}"]
    config = load_config(RecommenderConfig, parsed.config, overrides)
    dataset, split = _load_split(parsed)
    print(dump_config(config))
    print(f"{split.rule}: " + ", ".join(f"{count:,} {name}" for name, count in split.counts().items()))
    try:
        model = train_recommender(
            split,
            dataset.num_items,
            config,
            seed=parsed.seed,
            item_map_hash=dataset.items.hash(),
            run_dir=parsed.output,
            resume=parsed.resume,
        )
    except Interrupted as stop:
        print(f"laser-fast: stopped by {stop.signal.name}; the same command with --resume goes on", file=sys.stderr)
        return stop.exit_status
    print(table({f"{type(model).__name__}, validation": evaluate(model, split.valid)}, _METRICS))
    print(f"its states: {model.gap}")
    print(f"saved in {parsed.output}")
    return 0


def _import(parsed: argparse.Namespace) -> int:
    """Read the checkpoint, rank the validation rows with it, and save it."""
    from laser_fast.evaluation import evaluate, table
    from laser_fast.recommenders.importers.checkpoints import import_recommender
    from laser_fast.recommenders.importers.item_map import read_item_map
    from laser_fast.recommenders.recommender_files import save_recommender

    dataset, split = _load_split(parsed)
    output = Path(parsed.output)
    with claim(output):
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
        print(report)
        if parsed.trained_on_this_split:
            model.split_hash = split.hash
        else:
            refused = "Laser's training refuses it without --trained-on-this-split"
            print(f"on which split it was trained is unknown: {refused}")
        if len(split.valid):
            print(table({f"{parsed.kind}, validation": evaluate(model, split.valid)}, _METRICS))
        save_recommender(model, output, imported=report.to_dict())
        print(f"saved in {parsed.output}")
    return 0


def _load_split(parsed: argparse.Namespace) -> tuple[SequenceDataset, Split]:
    """The data set, split by `--split` and `--split-set`."""
    dataset = SequenceDataset.load(resolve_path(parsed.data, "data"))
    kind = [] if parsed.split is None else [f"kind={parsed.split}"]
    config = load_config(SplitConfig, None, [*kind, *parsed.split_set])
    return dataset, make_split(dataset, **config.model_dump())
