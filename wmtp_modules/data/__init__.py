"""Data: sources, tokenising, contamination guard, packing."""

from wmtp_modules.data.code_contests import code_contests_dataset
from wmtp_modules.data.mbpp import mbpp_dataset
from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.data.rows import rows_dataset

__all__ = [
    "PackedDataset",
    "code_contests_dataset",
    "collate",
    "mbpp_dataset",
    "rows_dataset",
]
