from wmtp_modules.scoring.reference import align_reference, reference_losses, score_rows
from wmtp_modules.scoring.rewards import (
    RewardModel,
    RewardStatistics,
    reward_fingerprint,
    reward_rows,
)
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)

__all__ = [
    "RewardModel",
    "RewardStatistics",
    "ScoreTable",
    "align_reference",
    "compute_scores",
    "fingerprint_checkpoint",
    "fingerprint_rows",
    "fingerprint_tokenizer",
    "reference_losses",
    "reward_fingerprint",
    "reward_rows",
    "score_rows",
]
