"""Anonymous memory of each rank while it loads its shard of a 1.3B checkpoint.

    python benchmarks/load_memory.py

Makes a Meta-format checkpoint of Sheared-LLaMA-1.3B's shape (4 heads, bf16 on disk, random
values), converts it to Hugging Face's format, and loads both with two gloo ranks under FSDP2.
Needs 6 GB of disk in the temporary folder and 8 GB of memory.
"""

import sys
import tempfile
import time
from pathlib import Path

import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import PeakAnonymousMemory, hardware
from sentencepiece import sentencepiece_model_pb2
from torch.distributed.device_mesh import init_device_mesh

from wmtp_modules.checkpoints.names import parameter_shapes
from wmtp_modules.checkpoints.read import load_into, model_args_from_folder
from wmtp_modules.checkpoints.write import write_meta
from wmtp_modules.convert import convert
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.sharding import shard_model

WORLD = 2
ALLOWANCE = 1_500_000_000  # bytes above a rank's own shard
ARGS = dict(
    vocab_size=32_000,
    num_layers=24,
    n_future_tokens=4,
    num_heads=16,
    num_kv_heads=16,
    embed_dim=2048,
    max_seq_len=4096,
    intermediate_dim=5504,
    norm_eps=1e-5,
    rope_base=10_000.0,
)


def make_tokenizer(path: Path) -> None:
    """A SentencePiece model with as many pieces as Llama-2's; only their number matters here."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([Path(spm.__file__).read_text()]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1_000_000,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for i in range(len(proto.pieces), ARGS["vocab_size"]):
        proto.pieces.add(piece=f"filler{i}", score=-float(i))
    path.write_bytes(proto.SerializeToString())


def make_checkpoint(folder: Path) -> None:
    make_tokenizer(folder / "tokenizer.model")
    tensors = (
        (key, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
        for key, shape in parameter_shapes(ARGS).items()
    )
    write_meta(tensors, ARGS, folder / "meta", folder / "tokenizer.model")


def rank_main(rank: int, folder: Path, source: str, dtype: torch.dtype, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    with torch.device("meta"):
        model = mtp_llama2(**model_args_from_folder(folder / source, max_seq_len=4096)).to(dtype)
    shard_model(model, mesh, compute_dtype=dtype)
    dist.barrier()
    started = time.perf_counter()
    with PeakAnonymousMemory() as peak:
        load_into(model, folder / source, device="cpu")
    seconds = time.perf_counter() - started
    shard = sum(p.to_local().nbytes for p in model.parameters())
    rows = [None] * WORLD
    dist.all_gather_object(rows, (shard, peak.bytes, seconds))
    if rank == 0:
        for r, (shard_r, peak_r, seconds_r) in enumerate(rows):
            verdict = "PASS" if peak_r <= shard_r + ALLOWANCE else "FAIL"
            print(
                f"{source:5} {str(dtype)[6:]:9} {r:4} {shard_r / 1e9:9.2f} {peak_r / 1e9:9.2f} "
                f"{(peak_r - shard_r) / 1e9:9.2f} {seconds_r:8.1f}  {verdict}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    print(f"{hardware()}\n$ python {' '.join(sys.argv)}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder)
        size = (folder / "meta" / "consolidated.pth").stat().st_size
        print(f"checkpoint: {size / 1e9:.2f} GB in bf16, 20 trunk blocks and 4 heads")
        with PeakAnonymousMemory() as peak:
            convert(folder / "meta", folder / "hf", to="hf")
        print(f"converted to Hugging Face's format with {peak.bytes / 1e9:.2f} GB\n")
        print("Peak RssAnon above its value before loading, GB; limit: shard + 1.5")
        print("from  dtype     rank     shard      peak    excess  seconds")
        for i, (source, dtype) in enumerate(
            [("meta", torch.float32), ("meta", torch.bfloat16), ("hf", torch.float32)]
        ):
            arguments = (folder, source, dtype, folder / f"store{i}")
            mp.spawn(rank_main, args=arguments, nprocs=WORLD)


if __name__ == "__main__":
    main()
