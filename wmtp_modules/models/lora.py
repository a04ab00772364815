"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314) on the blocks of a multi-token model.

The layers are torchtune's ``LoRALinear``, ``W x + (alpha / rank) B A x`` with a frozen W, which for
QLoRA is torchao's ``NF4Tensor``. Embedding, norms and output are frozen as they are.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules.peft import LoRALinear, get_merged_lora_ckpt
from torchtune.training import set_default_dtype

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP = ("w1", "w2", "w3")  # gate, down, up
ALL_LINEAR = "all-linear"
# Of torchao's NF4: values that share a scale, times scales that share a scale.
NF4_VALUES = 64 * 256
A, B = "lora_a.weight", "lora_b.weight"


@dataclass(frozen=True)
class LoRA:
    """What is adapted, and how.

    Args:
        rank: of A [rank, in] and B [out, rank].
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: of an adapter's input, in training.
        targets: names of a block's linear layers, or "all-linear".
        heads: also the blocks of heads 1 to K - 1; trunk and head 0, which are an ordinary Llama,
            always.
        quantize_base: hold the adapted layers' W in NF4.
        save_adapter_only: exports are adapters alone, without the merged model.
        base: folder of the frozen model, to be named in exports.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    heads: bool = True
    quantize_base: bool = False
    save_adapter_only: bool = False
    base: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Adapted layers of a block, in a block's order."""
        every = (*ATTENTION, *MLP)
        return every if self.targets == ALL_LINEAR else tuple(n for n in every if n in self.targets)

    def adapts(self, key: str) -> bool:
        """Whether a weight of the model, by our key, has an adapter."""
        is_extra = key.startswith("heads.") and not key.startswith("heads.0.")
        names = tuple(f".{name}.weight" for name in self.names)
        return key.endswith(names) and (self.heads or not is_extra)


class AddedLoRALinear(LoRALinear):
    """torchtune's layer, whose forward adds the adapter where the base's product already lies.

    Scaling and adding by themselves each go through an output as large as the base's, twice with
    their backward: a tenth of a small model's step. In bf16 the sum is rounded once.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_dim)
        out = F.linear(flat, self.weight)  # NF4 has its own
        if not self.disabled:
            low = self.lora_a(self.dropout(flat))
            out = out.addmm_(low, self.lora_b.weight.t(), alpha=self.alpha / self.rank)
        return out.view(*x.shape[:-1], self.out_dim)


def adapt_block(block: nn.Module, lora: LoRA, adapter_dtype: torch.dtype) -> None:
    """Replace the named layers of one block, see ``MTPTransformer.add_lora``."""
    for name in lora.names:
        parent = block.get_submodule("attn" if name in ATTENTION else "mlp")
        old = cast(nn.Linear, parent.get_submodule(name))
        setattr(parent, name, _adapted(old, name, lora, adapter_dtype))


def _adapted(old: nn.Linear, name: str, lora: LoRA, adapter_dtype: torch.dtype) -> AddedLoRALinear:
    narrow = min(old.in_features, old.out_features)
    if lora.rank >= narrow:
        raise ValueError(
            f"lora.rank: {lora.rank} is not below {narrow}, the width of {name}: nothing would be "
            "saved, lower it"
        )
    if lora.quantize_base and old.weight.numel() % NF4_VALUES:
        raise ValueError(
            f"lora.quantize_base: {name} has {old.out_features} x {old.in_features} weights, and "
            f"NF4 takes multiples of {NF4_VALUES}: leave it out of lora.targets, or take a model "
            "of other widths"
        )
    with torch.device("meta"), set_default_dtype(old.weight.dtype):
        new = AddedLoRALinear(
            old.in_features,
            old.out_features,
            lora.rank,
            lora.alpha,
            lora.dropout,
            quantize_base=lora.quantize_base,
        )
    if not old.weight.is_meta:
        weight = to_nf4(old.weight.detach()) if lora.quantize_base else old.weight.detach()
        new.weight = nn.Parameter(weight, requires_grad=False)
    where = {"bias": False, "device": old.weight.device, "dtype": adapter_dtype}
    new.lora_a = nn.Linear(old.in_features, lora.rank, **where)
    new.lora_b = nn.Linear(lora.rank, old.out_features, **where)
    return new


def nf4_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The quantised ones."""
    return {one for one in model.parameters() if isinstance(one, NF4Tensor)}


def is_adapter(key: str) -> bool:
    """Whether a key of a model's state belongs to an adapter."""
    return key.endswith((A, B))


@torch.no_grad()
def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """W + (alpha / rank) B A in fp32, or fp64 where one is; W may be quantised."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(weight, NF4Tensor):
        weight = weight.get_original_weight()
    state = {"weight": weight.to(wide, copy=True), A: a.to(wide), B: b.to(wide)}
    state = {f"one.{name}": value for name, value in state.items()}
    return get_merged_lora_ckpt(state, rank=len(a), alpha=alpha)["one.weight"]


def quantised_and_back(weight: torch.Tensor) -> torch.Tensor:
    """The values that a weight has in NF4, in its dtype."""
    return to_nf4(weight).get_original_weight()
