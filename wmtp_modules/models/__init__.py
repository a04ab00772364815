"""The multi-token-prediction Llama. Exports what a YAML may name."""

from wmtp_modules.models.model_builders import (
    mtp_from_checkpoint,
    mtp_llama2,
    mtp_llama2_7b,
    mtp_sheared_llama_1_3b,
)

__all__ = ["mtp_from_checkpoint", "mtp_llama2", "mtp_llama2_7b", "mtp_sheared_llama_1_3b"]
