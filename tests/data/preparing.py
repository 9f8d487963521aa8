"""What the tests of preparing share: requests as the command makes them, data sets in the words of their sources."""

import argparse

from laser_fast.cli import prepare as command
from laser_fast.data import PrepareRequest, SequenceDataset


def request_of(*arguments: object) -> PrepareRequest:
    """The request of `laser-fast prepare ARGUMENTS`."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    return command.request_of(parser.parse_args([str(argument) for argument in arguments]))


def items_of_users(dataset: SequenceDataset) -> dict[str, list[str]]:
    """External ids of every user's items, oldest first."""
    return {
        user: [dataset.items.ids[item] for item in dataset.sequence(row)] for row, user in enumerate(dataset.user_ids)
    }
