"""What blocks keep of their forward for their backward, and what they compute a second time.

``none`` keeps everything. ``selective`` keeps the results of matrix products and of attention, and
computes norms, rotations and activations again, as torchtitan's per-operator policy does. ``full``
keeps a block's input, and runs its whole forward again (Chen et al. 2016, arXiv 1604.06174).
"""

from functools import partial
from typing import Literal

import torch
import torch._functorch.config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from wmtp_modules.models.mtp_transformer import MTPTransformer

Checkpointing = Literal["none", "selective", "full"]

_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.mm.default,
    _ATEN._scaled_mm.default,  # of float8
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks_(model: MTPTransformer, how: Checkpointing, *, compiled: bool) -> None:
    """Wrap every block, or have its compiler do it; before the model is sharded.

    Args:
        compiled: blocks are compiled already. A block is compiled before it is wrapped: the other
            way round a flex-attention mask breaks the graph, and a break inside a checkpointed
            region makes all of it eager. A policy of operators sees nothing of a compiled block, so
            ``selective`` leaves it to the compiler's partitioner, which then recomputes whatever is
            neither a product nor attention. That is a setting of the process.
    """
    torch._functorch.config.aggressive_recomputation = how == "selective" and compiled
    if how == "none" or (how == "selective" and compiled):
        return
    wrap = checkpoint_wrapper
    if how == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        wrap = partial(checkpoint_wrapper, context_fn=contexts)
    for blocks in (model.layers, model.heads):
        for i, block in enumerate(blocks):
            blocks[i] = wrap(block)
