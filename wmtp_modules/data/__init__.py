"""Data: sources, tokenising, contamination guard, packing. Exports what a YAML may name."""

from wmtp_modules.data.code_contests import code_contests_dataset
from wmtp_modules.data.mbpp import mbpp_dataset
from wmtp_modules.data.rows import rows_dataset

__all__ = ["code_contests_dataset", "mbpp_dataset", "rows_dataset"]
