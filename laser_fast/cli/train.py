"""`laser-fast train`: train Laser by a configuration, or go on with a run that was stopped."""

import argparse
import shlex
import sys

from laser_fast.cli.arguments import add_config
from laser_fast.config import LaserConfig, dump_config, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast train CONFIG`."""
    add_config(parser, "training.seed=1")
    parser.add_argument("--resume", action="store_true", help="go on with the run in `output` from its last state")


def run(parsed: argparse.Namespace) -> int:
    """Train; of several processes the first one speaks."""
    from laser_fast.processes import OtherProcessFailed, launched_first, launched_size, leave
    from laser_fast.training.interruption import Interrupted
    from laser_fast.training.train import is_finished, train_laser

    config = load_config(LaserConfig, parsed.config, parsed.set)
    say = print if launched_first() else (lambda *_, **__: None)
    say(dump_config(config))
    if parsed.resume and is_finished(config):
        say(f"{config.output} is finished: nothing is left to train")
        return 0
    try:
        train_laser(config, resume=parsed.resume)
    except OtherProcessFailed:
        return 2  # the other one says why
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
