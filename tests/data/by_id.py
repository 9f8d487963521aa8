"""Data sets in the words of their sources."""

from laser_fast.data import SequenceDataset


def items_of_users(dataset: SequenceDataset) -> dict[str, list[str]]:
    """External ids of every user's items, oldest first."""
    return {
        user: [dataset.items.ids[item] for item in dataset.sequence(row)] for row, user in enumerate(dataset.user_ids)
    }
