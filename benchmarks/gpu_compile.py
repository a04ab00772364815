"""Step time with blocks compiled before and after they are wrapped for checkpointing, and eager.

    python3 benchmarks/gpu_compile.py
    uv run python benchmarks/gpu_compile.py --device cpu --tiny

One GPU, no launcher and no command line of torchtune's; torchtune itself is needed. Blocks have
the shape of the 7B (D 4096, 32 heads, feed-forward 11008, rows of 4096 packed tokens), but only six
are in the trunk beside the four heads, so that three variants take minutes and fit most cards: all
32 with fp32 masters, gradients and AdamW's two moments take 100 GiB, 107 GiB with the activations.
Activation checkpointing throughout, bf16 compute, FSDP2 on one rank, folded uniform weights,
clipping and fused AdamW, as a recipe has them. Masks are made beforehand. The variants follow one
another: each has the memory to itself.

``--tiny`` is for trying the script: on a CPU flex attention has no backward, so a plain attention
stands in for its kernel.
"""

import argparse
import gc
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import hardware
from torch._inductor.compile_fx import compile_fx
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtune.modules import TransformerSelfAttentionLayer, attention_utils

from wmtp_modules.loss.mtp_loss import head_alphas, mtp_labels
from wmtp_modules.models.model_builders import mtp_llama2
from wmtp_modules.parallel.sharding import shard_model

# fp32 activations meet a bf16 scale on purpose; torchtune logs through a cached function.
for told in ("Mismatch dtype between", "Dynamo detected a call to a `functools.lru_cache`"):
    warnings.filterwarnings("ignore", message=told)
K = 4
VARIANTS = ("eager", "compiled after wrapping (the fault)", "compiled before wrapping (ours)")


class Graphs:
    """A backend of ``torch.compile`` that counts the graphs it compiles and their runs."""

    def __init__(self):
        self.made = self.runs = 0

    def __call__(self, graph, inputs):
        self.made += 1
        compiled = compile_fx(graph, inputs)

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run


def stand_in_for_flex():
    """Let torchtune believe in flex attention on a CPU, with a kernel that runs there."""

    @torch.compiler.disable(recursive=False)
    def attention(q, k, v, block_mask):
        at, rows = torch.arange(q.shape[2]), torch.arange(len(q))[:, None, None]
        mask_BTT = block_mask.mask_mod(rows, 0, at[:, None], at[None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTT[:, None])

    attention_utils._SUPPORTS_FLEX_ATTENTION = True
    attention_utils.BlockMask = BlockMask
    attention_utils.compile_friendly_flex_attention = attention


def make_batch(B, T, vocab, device, generator):
    """A packed batch with the mask and the labels of its documents."""
    cuts = torch.randint(1, T, (B, 5), generator=generator).sort(1).values
    doc_BT = (torch.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1)
    starts_BT = torch.searchsorted(doc_BT, doc_BT, right=False)
    doc_BT, input_pos = doc_BT.to(device), (torch.arange(T) - starts_BT).to(device)
    tokens_BT = torch.randint(vocab, (B, T), generator=generator).to(device)

    def mask_mod(b, h, q, k):  # as torchtune's packed_block_causal_mask
        return (q >= k) & (doc_BT[b, q] == doc_BT[b, k])

    mask = create_block_mask(mask_mod, B, None, T, T, device=device)
    labels_BTK = mtp_labels(tokens_BT, doc_BT >= 0, doc_BT, K)
    return tokens_BT, labels_BTK, mask, input_pos


def build(variant, sizes, device, mesh, graphs):
    """As ``wmtp_modules.run.model.make_model``, apart from the order that a variant is about."""
    torch.manual_seed(0)
    with torch.device(device):
        model = mtp_llama2(n_future_tokens=K, **sizes)
    if "before" in variant:
        for block in (*model.layers, *model.heads):
            block.compile(backend=graphs)
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, TransformerSelfAttentionLayer)
    )
    if "after" in variant:
        for block in (*model.layers, *model.heads):
            block.compile(backend=graphs)
    if variant != "eager":
        model.output.loss_impl = "compiled"
    return shard_model(model, mesh, compute_dtype=torch.bfloat16).train()


def step(model, optimizer, batch, alphas_K):
    tokens_BT, labels_BTK, mask, input_pos = batch
    weights_BTK = alphas_K * torch.ones_like(labels_BTK, dtype=torch.float32)
    total, _ = model(
        tokens_BT, labels_BTK, mask=mask, input_pos=input_pos, token_weights_BTK=weights_BTK
    )
    loss = total / (alphas_K * (labels_BTK >= 0).sum((0, 1))).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def measure(variant, args, sizes, device, mesh):
    """Seconds of each timed step, loss of each step, graphs, their runs in a step, peak bytes."""
    torch._dynamo.reset()
    graphs, on_gpu = Graphs(), device == "cuda"
    model = build(variant, sizes, device, mesh, graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    alphas_K = head_alphas(K).to(device)
    generator = torch.Generator().manual_seed(1)
    rows = args.batch_size, sizes["max_seq_len"], sizes["vocab_size"]
    batches = [make_batch(*rows, device, generator) for _ in range(4)]
    losses, seconds, runs = [], [], 0
    for number in range(args.warm_up + args.steps):
        if on_gpu:
            torch.cuda.synchronize()
            if number == args.warm_up:
                torch.cuda.reset_peak_memory_stats()
        started, runs_before = time.perf_counter(), graphs.runs
        losses.append(step(model, optimizer, batches[number % len(batches)], alphas_K))
        if on_gpu:
            torch.cuda.synchronize()
        runs = graphs.runs - runs_before
        if number >= args.warm_up:
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return seconds, [float(loss) for loss in losses], graphs.made, runs, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small blocks and rows, to try it")
    parser.add_argument("--trunk", type=int, default=6, help="blocks of the trunk")
    parser.add_argument("--batch-size", type=int, default=2, help="packed rows of a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    args = parser.parse_args()
    device, on_gpu = args.device, args.device == "cuda"
    sizes = {"vocab_size": 32_000, "embed_dim": 4096, "num_heads": 32, "max_seq_len": 4096}
    if args.tiny:
        sizes = {"vocab_size": 512, "embed_dim": 64, "num_heads": 4, "max_seq_len": 256}
    T = sizes["max_seq_len"]
    print(hardware() + (f", {torch.cuda.get_device_name()}" if on_gpu else ""))
    print(
        f"D={sizes['embed_dim']}, V={sizes['vocab_size']}, {args.trunk} trunk blocks + {K} heads, "
        f"{args.batch_size} x {T} tokens, bf16 compute, fp32 masters, activation checkpointing, "
        f"{args.steps} steps after {args.warm_up}"
    )
    sizes |= {"num_layers": args.trunk + K, "num_kv_heads": sizes["num_heads"]}
    if not on_gpu:
        stand_in_for_flex()
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        mesh = init_device_mesh(device, (1,))
        found = {}
        print(f"{'variant':38}{'graphs':>7}{'runs':>6}{'step ms (quartiles)':>30}", end="")
        print(f"{'tokens/s':>10}{'GiB':>7}{'last loss':>11}")
        for variant in VARIANTS:
            found[variant] = measure(variant, args, sizes, device, mesh)
            seconds, losses, made, runs, peak = found[variant]
            low, middle, high = (1000 * x for x in quantiles(seconds, n=4))
            print(
                f"{variant:38}{made:7}{runs:6}{middle:14.1f} ({low:.1f}-{high:.1f})"
                f"{1000 * args.batch_size * T / middle:10.0f}{peak / 2**30:7.1f}"
                f"{losses[-1]:11.4f}",
                flush=True,
            )
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        dist.destroy_process_group()
    middles = {variant: quantiles(found[variant][0], n=4)[1] for variant in VARIANTS}
    ours, blocks = VARIANTS[2], args.trunk + K
    for variant in VARIANTS[:2]:
        print(f"ours / {variant}: {middles[ours] / middles[variant]:.3f} of its step")
    # Each block runs a graph before its attention and one after, in the forward and again in the
    # backward of checkpointing.
    ok = found[ours][3] >= 4 * blocks
    ok &= all(abs(a - b) < 0.02 for a, b in zip(found[ours][1], found["eager"][1], strict=True))
    claim = "every block compiled, losses as eager"
    if on_gpu:
        ok &= all(middles[ours] < 0.97 * middles[variant] for variant in VARIANTS[:2])
        claim += ", at least 3 % faster"
    print("PASS" if ok else "FAIL", claim)


if __name__ == "__main__":
    main()
