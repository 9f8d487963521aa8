"""Data: formats in, canonical item tables and sequences, splits, texts and packed tokens.

Arrays here are numpy; nothing in this room knows a model.
"""

from laser_fast.data.dataset import SequenceDataset, write_dataset
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.sequences import EvaluationRows, PackedSequences
from laser_fast.data.split import Split, TrainingRows, leave_one_out, training_rows

__all__ = [
    "EvaluationRows",
    "ItemTable",
    "Manifest",
    "PackedSequences",
    "SequenceDataset",
    "SourceFile",
    "Split",
    "TrainingRows",
    "leave_one_out",
    "training_rows",
    "write_dataset",
]
