"""`laser-fast plan`: the memory that training needs, and the settings with which it fits a GPU."""

import argparse
import json
from dataclasses import replace

from laser_fast.cli.arguments import add_config, whole_number
from laser_fast.config import LaserConfig, load_config

_CARDS = ["8GB", "12GB", "16GB", "24GB"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `laser-fast plan CONFIG`."""
    add_config(parser, "lm.quantization=nf4")
    parser.add_argument("--gpu", nargs="+", default=_CARDS, metavar="SIZE", help="cards, as sold")
    parser.add_argument("--cpu", action="store_true", help="for training on a CPU instead")
    parser.add_argument("--items", type=whole_number(1, 2**31 - 1), metavar="N", help="size of the catalogue to come")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(parsed: argparse.Namespace) -> None:
    """Print the plan as a table or as JSON."""
    from laser_fast.planning.plan import estimate_memory
    from laser_fast.planning.plan_table import table, to_dict
    from laser_fast.planning.workload import workload_of

    config = load_config(LaserConfig, parsed.config, parsed.set)
    workload = workload_of(config)
    if parsed.items is not None:
        workload = replace(workload, num_items=parsed.items)
    plan = estimate_memory(config, workload, on_gpu=not parsed.cpu)
    cards = [] if parsed.cpu else parsed.gpu
    print(json.dumps(to_dict(plan, cards), indent=2) if parsed.json else table(plan, cards))
