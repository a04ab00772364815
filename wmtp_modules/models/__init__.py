from wmtp_modules.models.model_builders import mtp_llama2, mtp_llama2_7b, mtp_sheared_llama_1_3b
from wmtp_modules.models.mtp_transformer import MTPTransformer

__all__ = ["MTPTransformer", "mtp_llama2", "mtp_llama2_7b", "mtp_sheared_llama_1_3b"]
