"""Data: logs and item tables of any format in, sequences, splits, texts and packed batches out.

Nothing here knows a model. Arrays are numpy; batches of tensors are imported from their files, so that preparing data
imports no torch.
"""

from laser_fast.data.dataset import SequenceDataset, write_dataset
from laser_fast.data.items import ItemTable
from laser_fast.data.manifest import Manifest, SourceFile
from laser_fast.data.preparation.prepare import describe, prepare
from laser_fast.data.preparation.presplit import given_split, prepare_presplit
from laser_fast.data.preparation.request import PrepareRequest
from laser_fast.data.preparation.titles import normalize_title
from laser_fast.data.readers import InteractionColumns
from laser_fast.data.sequences import EvaluationRows, PackedSequences
from laser_fast.data.splits.by_time import global_time
from laser_fast.data.splits.by_user import by_user
from laser_fast.data.splits.kinds import SplitKind, make_split
from laser_fast.data.splits.split import Split, TrainingRows, leave_one_out, training_rows
from laser_fast.data.text import ItemText, clean_text
from laser_fast.data.tokens import (
    PromptLayout,
    TokenizedTexts,
    history_tokens,
    prompt_layout,
    prompt_lengths,
    tokenize_texts,
)

__all__ = [
    "EvaluationRows",
    "InteractionColumns",
    "ItemTable",
    "ItemText",
    "Manifest",
    "PackedSequences",
    "PrepareRequest",
    "PromptLayout",
    "SequenceDataset",
    "SourceFile",
    "Split",
    "SplitKind",
    "TokenizedTexts",
    "TrainingRows",
    "by_user",
    "clean_text",
    "describe",
    "given_split",
    "global_time",
    "history_tokens",
    "leave_one_out",
    "make_split",
    "normalize_title",
    "prepare",
    "prepare_presplit",
    "prompt_layout",
    "prompt_lengths",
    "tokenize_texts",
    "training_rows",
    "write_dataset",
]
