"""What is computed twice, and that gradients are the same to the bit."""

import shutil
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.checkpointing import checkpoint_blocks_

ATEN = torch.ops.aten


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def step(args, how, *, compiled=False):
    torch.manual_seed(0)
    model = mtp_llama2(**args)
    if compiled:
        for block in (*model.layers, *model.heads):
            block.compile()
    checkpoint_blocks_(model, how, compiled=compiled)
    tokens = torch.randint(0, args["vocab_size"], (2, 16))
    labels = torch.randint(0, args["vocab_size"], (2, 16, args["n_future_tokens"]))
    # A compiled block is no matter of operators, and none is compiled below such a mode.
    with Counting() if not compiled else nullcontext(Counting()) as counted:
        model(tokens, labels).sum().backward()
    grads = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
    }
    return grads, counted.count


def test_products_and_attention_are_kept(tiny_model_args):
    blocks = tiny_model_args["num_layers"]
    plain, of_plain = step(tiny_model_args, "none")
    selective, of_selective = step(tiny_model_args, "selective")
    full, of_full = step(tiny_model_args, "full")
    for name, grad in plain.items():
        assert torch.equal(selective[name], grad), name
        assert torch.equal(full[name], grad), name
    attention = ATEN._scaled_dot_product_flash_attention_for_cpu.default
    # Of seven products the last one is not repeated: nothing needs it.
    for op, each in ((ATEN.mm.default, 6), (attention, 1)):
        assert of_selective[op] == of_plain[op]
        assert of_full[op] == of_plain[op] + each * blocks
    for one in (of_selective, of_full):
        assert one[ATEN.silu.default] == 2 * of_plain[ATEN.silu.default] == 2 * blocks


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles on a CPU, which needs g++")
def test_a_compiled_block_keeps_less(tiny_model_args):
    """Bytes that a compiled block saves for its backward: by the compiler's partitioner."""
    saved, grads = {}, {}
    for how in ("none", "selective"):
        torch._dynamo.reset()
        seen = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            grads[how], _ = step(tiny_model_args, how, compiled=True)
        saved[how] = sum(seen.values())
    assert saved["selective"] < 0.9 * saved["none"]
    for name, grad in grads["none"].items():
        torch.testing.assert_close(grads["selective"][name], grad)
