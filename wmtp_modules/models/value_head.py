"""The critic's value head: a scalar per position from the trunk's last hidden state."""

import torch
from torch import nn
from torchtune.modules import RMSNorm


class ValueHead(nn.Module):
    """RMSNorm, Linear, SiLU, Linear to one number, computed in fp32; then scale * v + shift.

    The output layer starts at zero, so an untrained critic gives everything the same value.
    ``scale`` and ``shift`` map values to the scale of the rewards; they are fitted after pairwise
    training, whose values have an arbitrary offset and scale, and are 1 and 0 otherwise.

    Args:
        embed_dim: width D of the trunk's output.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(embed_dim)
        self.hidden = nn.Linear(embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Values after each token.

        Args:
            hidden_BTD: the trunk's output, any floating dtype.

        Returns:
            values_BT, fp32. The value before token u is values[b, u - 1].
        """
        hidden_BTD = self.norm(hidden_BTD.float())
        hidden_BTD = nn.functional.silu(self.hidden(hidden_BTD))
        return self.scale * self.out(hidden_BTD).squeeze(-1) + self.shift
