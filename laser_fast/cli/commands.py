"""The commands: each is a few lines over the library, and imports its room only when it runs."""

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laser_fast import __version__
from laser_fast.cli.evaluation import add_evaluation_commands, add_places, load_run, write_figures
from laser_fast.cli.numbers import whole_number
from laser_fast.cli.output import Parser, report_error, safe_output
from laser_fast.config import (
    LaserConfig,
    RecommenderConfig,
    SplitConfig,
    build_config,
    dump_config,
    load_config,
    resolve_path,
)
from laser_fast.printable import printable, shorten

_LONGEST_TITLE = 300  # characters of it that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or that of `report_error`, which has told why on stderr."""
    trace = False
    with safe_output():
        try:
            parsed = parser().parse_args(arguments)
            trace = parsed.traceback
            status = int(parsed.run(parsed) or 0)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error of it is told
            return status
        except (Exception, KeyboardInterrupt) as error:
            return report_error(error, trace=trace)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments; `parse_args(...).run` is the function of the command."""
    root = Parser(prog="laser-fast", description="LLM-based sequential recommendation on one GPU.")
    root.add_argument("--version", action="version", version=f"laser-fast {__version__}")
    root.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="turn interaction logs and item files into a data set")
    _add_prepare(prepare)

    _add_recommender(commands.add_parser("recommender", help="the ID-based recommender that M-Former reads"))

    train = commands.add_parser("train", help="train Laser by a configuration")
    train.add_argument("config", help="YAML file")
    _add_settings(train, "training.seed=1")
    train.add_argument("--resume", action="store_true", help="go on with the run in `output` from its last whole state")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="how much memory training needs, and what to set for a GPU")
    plan.add_argument("config", help="YAML file")
    _add_settings(plan, "lm.quantization=nf4")
    plan.add_argument(
        "--gpu", nargs="+", default=["8GB", "12GB", "16GB", "24GB"], metavar="SIZE", help="cards, as sold"
    )
    plan.add_argument("--cpu", action="store_true", help="for training on a CPU instead")
    plan.add_argument(
        "--items",
        type=whole_number(1, 2**31 - 1),
        metavar="N",
        help="size of the catalogue, where there is no data set yet",
    )
    plan.add_argument("--json", action="store_true", help="machine-readable")
    plan.set_defaults(run=_plan)

    add_evaluation_commands(commands)
    for name, run, text in (
        ("compare", _compare, "Laser beside the baselines, on the test users"),
        ("recommend", _recommend, "recommend for users of the data set, or for a history of item ids"),
        ("report", _report, "one page about a run: curves, what the experts do, who is served well, samples"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", metavar="RUN", help="run directory written by train")
        add_places(command)
        if name == "recommend":
            _add_recommend(command)
        elif name == "report":
            command.add_argument("--output", metavar="FOLDER", help="where it goes (default: RUN/report)")
        else:
            command.add_argument("--output", help="also write the figures to this JSON file")
        command.set_defaults(run=run)

    doctor = commands.add_parser("doctor", help="what is installed, what runs, and why not")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=_doctor)
    return root


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from laser_fast.cli.prepare_arguments import add_prepare_arguments

    add_prepare_arguments(parser)
    parser.set_defaults(run=_prepare)


def _add_recommender(parser: argparse.ArgumentParser) -> None:
    from laser_fast.cli.recommender_arguments import add_import_arguments, add_train_arguments

    steps = parser.add_subparsers(required=True, metavar="STEP")
    train = steps.add_parser("train", help="train SASRec or GRU4Rec on the training part of a data set")
    add_train_arguments(train)
    _add_settings(train, "width=128")
    train.set_defaults(run=_train_recommender)
    take = steps.add_parser("import", help="take a recommender that was trained with RecBole or for LLaRA")
    add_import_arguments(take)
    take.set_defaults(run=_import_recommender)


def _add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"override one setting, e.g. --set {example}"
    )


def _add_recommend(parser: argparse.ArgumentParser) -> None:
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--history", nargs="+", metavar="ITEM", help="item ids, oldest first; nobody needs to be a known user"
    )
    who.add_argument("--user", nargs="+", metavar="USER", help="users of the data set")
    who.add_argument(
        "--sample", type=whole_number(1), default=3, metavar="N", help="N users of the data set (default: 3)"
    )
    parser.add_argument("-k", type=whole_number(1), default=5, help="items to recommend")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--json", action="store_true", help="one JSON object per user")


def _prepare(parsed: argparse.Namespace) -> None:
    from laser_fast.cli.prepare_arguments import prepare_from_arguments

    prepare_from_arguments(parsed, print)


def _train_recommender(parsed: argparse.Namespace) -> int:
    from laser_fast.data import SequenceDataset
    from laser_fast.evaluation import evaluate, table
    from laser_fast.training.interruption import Interrupted
    from laser_fast.training.recommender.train_recommender import train_recommender

    overrides = [*parsed.set, *([f"kind={parsed.kind}"] if parsed.kind else [])]
    overrides += [] if parsed.folds is None else [f"folds={parsed.folds}"]
    if parsed.config is None:
        config = build_config(RecommenderConfig, _settings(overrides))
    else:
        config = load_config(RecommenderConfig, parsed.config, overrides)
    dataset = SequenceDataset.load(resolve_path(parsed.data, "data"))
    split = _split(dataset, parsed)
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
    print(table({f"{type(model).__name__}, validation": evaluate(model, split.valid)}, ("HR@10", "NDCG@10", "MRR")))
    print(f"its states: {model.gap}")
    print(f"saved in {parsed.output}")
    return 0


def _import_recommender(parsed: argparse.Namespace) -> None:
    from laser_fast.cli.recommender_arguments import import_from_arguments
    from laser_fast.data import SequenceDataset

    dataset = SequenceDataset.load(resolve_path(parsed.data, "data"))
    import_from_arguments(parsed, dataset, _split(dataset, parsed), say=print)


def _train(parsed: argparse.Namespace) -> int:
    from laser_fast.processes import OtherProcessFailed, launched_first, launched_size, leave
    from laser_fast.training.interruption import Interrupted
    from laser_fast.training.train import is_finished, train_laser

    config = load_config(LaserConfig, parsed.config, parsed.set)
    say = print if launched_first() else (lambda *_, **__: None)  # of several processes one speaks
    say(dump_config(config))
    if parsed.resume and is_finished(config):
        say(f"{config.output} is finished: nothing is left to train")
        return 0
    try:
        train_laser(config, resume=parsed.resume)
    except OtherProcessFailed:
        return 2  # it says why
    except Interrupted as stop:
        size = launched_size()
        launcher = ["laser-fast"] if size == 1 else ["torchrun", f"--nproc-per-node={size}", "-m", "laser_fast"]
        settings = [part for setting in parsed.set for part in ("--set", setting)]
        again = shlex.join([*launcher, "train", parsed.config, *settings, "--resume"])
        say(f"laser-fast: stopped by {stop.signal.name}; go on with: {again}", file=sys.stderr)
        return stop.exit_status
    leave()
    say(f"saved in {config.output}")
    return 0


def _plan(parsed: argparse.Namespace) -> None:
    from dataclasses import replace

    from laser_fast.planning.plan import estimate_memory
    from laser_fast.planning.plan_table import table, to_dict, workload_of

    config = load_config(LaserConfig, parsed.config, parsed.set)
    workload = workload_of(config)
    if parsed.items is not None:
        workload = replace(workload, num_items=parsed.items)
    plan = estimate_memory(config, workload, on_gpu=not parsed.cpu)
    cards = [] if parsed.cpu else parsed.gpu
    print(json.dumps(to_dict(plan, cards), indent=2) if parsed.json else table(plan, cards))


def _compare(parsed: argparse.Namespace) -> None:
    import torch

    from laser_fast.evaluation.comparison import compare
    from laser_fast.laser.build import training_counts
    from laser_fast.models.zero_shot import text_vectors
    from laser_fast.nn.text_residual import centred
    from laser_fast.training.text_stage import fit_text_line

    model, inputs, config = load_run(parsed, parsed.model)
    counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
    vectors = text_vectors(model.lm, model.builder)
    read = centred(vectors) if model.text is None else model.text.fetch_vectors()
    temperature, seed = config.objective.temperature, config.training.seed
    cached = fit_text_line(read, inputs.split, counts, temperature=temperature, seed=seed)
    settings: dict[str, Any] = {"vectors": vectors, "cached": cached, "batch_size": config.evaluation.batch_size}
    settings["tables"] = inputs.tables(config.evaluation)
    comparison = compare(model, inputs.split, counts, inputs.recommender, **settings)
    print(comparison)
    write_figures(parsed.output, comparison.to_dict())


def _recommend(parsed: argparse.Namespace) -> None:
    from laser_fast.data import ItemText
    from laser_fast.laser.laser_files import origin_of

    if parsed.history is not None:
        model = _load_alone(parsed)
        users, histories = ["the history given"], [parsed.history]
    else:
        model, inputs, _ = load_run(parsed, parsed.model)
        dataset = inputs.dataset
        if parsed.user is None:
            sample = min(parsed.sample, dataset.num_users)
            chosen = [round(i * dataset.num_users / sample) for i in range(sample)]
        else:
            chosen = _user_indices(dataset.user_ids, parsed.user)
        users = [f"user {dataset.user_ids[index]}" for index in chosen]
        histories = [[dataset.items.ids[item] for item in dataset.sequence(index)] for index in chosen]
    answers = model.recommend(histories, parsed.k, exclude_seen=not parsed.include_seen)
    origin = origin_of(model)
    texts = ItemText(origin.config.prompt.item_template).render(origin.items)
    titles = dict(zip(model.item_ids, texts, strict=True))
    for user, history, answer in zip(users, histories, answers, strict=True):
        if parsed.json:
            items = [{"item": r.item_id, "score": r.score, "text": titles[r.item_id]} for r in answer]
            print(json.dumps({"user": user, "history": list(history), "recommendations": items}))
            continue
        newest = [_shown(titles.get(item, item)) for item in list(history)[-5:]]
        print(f"\n{_shown(user)}, {len(history)} items, the newest last:")
        print(textwrap.fill("; ".join(newest), 100, initial_indent="    ", subsequent_indent="    "))
        print("  recommended:")
        for rank, recommendation in enumerate(answer, start=1):
            print(f"    {rank}. {_shown(titles[recommendation.item_id])}  ({recommendation.score:.2f})")


def _shown(text: str) -> str:
    """Text of data for a line of a terminal."""
    return printable(shorten(text, _LONGEST_TITLE))


def _report(parsed: argparse.Namespace) -> None:
    import torch

    from laser_fast.laser.build import training_counts
    from laser_fast.reports import Subject, check_report_folder, read_run, write_report

    record, subject = read_run(parsed.model), None
    folder = Path(parsed.output) if parsed.output else Path(parsed.model) / "report"
    check_report_folder(folder)
    if record.kept is not None:
        model, inputs, config = load_run(parsed, parsed.model)
        counts = torch.from_numpy(training_counts(inputs.split, model.num_items))
        tables, size = inputs.tables(config.evaluation), config.evaluation.batch_size
        subject = Subject(model, inputs.dataset, inputs.split, counts, inputs.recommender, tables, size)
    print(f"written to {write_report(record, subject, folder)}")


def _doctor(parsed: argparse.Namespace) -> int:
    from laser_fast.doctor import print_report

    return print_report(parsed.json)


def _load_alone(parsed: argparse.Namespace) -> Any:
    """The model of a run or a folder of `save_pretrained`, for which no data set is needed."""
    from laser_fast.laser import LaserModel
    from laser_fast.laser.laser_files import find_saved

    if find_saved(resolve_path(parsed.model, "RUN")) is None:
        raise FileNotFoundError(f"recommend: the folder must hold a run or a saved Laser, got {parsed.model!r}")
    return LaserModel.from_pretrained(parsed.model, recommender=parsed.recommender, llm=parsed.llm)


def _split(dataset: Any, parsed: argparse.Namespace) -> Any:
    """The split of `--split` and `--split-set`."""
    from laser_fast.data import make_split

    kind = [] if parsed.split is None else [f"kind={parsed.split}"]
    return make_split(dataset, **build_config(SplitConfig, _settings([*kind, *parsed.split_set])).model_dump())


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    from laser_fast.config import apply_overrides

    return apply_overrides({}, overrides)


def _user_indices(user_ids: Sequence[str], wanted: Sequence[str]) -> list[int]:
    index = {user: position for position, user in enumerate(user_ids)}
    for user in wanted:
        if user not in index:
            raise ValueError(f"recommend: --user must name users of the data set, got {user!r}")
    return [index[user] for user in wanted]
