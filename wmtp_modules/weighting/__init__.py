from wmtp_modules.weighting.calibrate import calibrate
from wmtp_modules.weighting.critic import CriticWeighting
from wmtp_modules.weighting.token_weighting import TokenWeighting, gather_rows, own_rows

__all__ = ["CriticWeighting", "TokenWeighting", "calibrate", "gather_rows", "own_rows"]
