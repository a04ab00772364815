from wmtp_modules.generation.generate import Generation, Request, generate
from wmtp_modules.generation.measure import compare_decodings, measure_decoding

__all__ = ["Generation", "Request", "compare_decodings", "generate", "measure_decoding"]
