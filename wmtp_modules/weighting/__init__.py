from wmtp_modules.weighting.calibrate import calibrate
from wmtp_modules.weighting.token_weighting import TokenWeighting, gather_rows, own_rows

__all__ = ["TokenWeighting", "calibrate", "gather_rows", "own_rows"]
