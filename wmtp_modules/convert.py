"""Convert a checkpoint folder: ``python -m wmtp_modules.convert SRC DST --to FORMAT``."""

import argparse
import sys
from functools import partial
from pathlib import Path

from wmtp_modules.checkpoints.adapter import Adapter
from wmtp_modules.checkpoints.names import is_extra_head, parameter_shapes
from wmtp_modules.checkpoints.read import Checkpoint, is_meta
from wmtp_modules.checkpoints.refusals import weight_files
from wmtp_modules.checkpoints.write import write_meta
from wmtp_modules.checkpoints.write_hf import write_eagle3, write_hf
from wmtp_modules.files import read_json

WRITE = {
    "meta": write_meta,
    "mtp": write_meta,
    "hf": write_hf,
    "hf-mtp": partial(write_hf, all_heads=True),
    "eagle3": write_eagle3,
}
LARGE = 1_000_000_000  # bytes from which a progress bar is shown


def convert(
    src: Path,
    dst: Path,
    *,
    to: str,
    n_future_tokens: int | None = None,
    adapter: Path | None = None,
) -> str:
    """Convert the checkpoint folder ``src`` into the new or empty folder ``dst``.

    ``adapter`` is a folder of LoRA's adapters, which are merged on the way.

    ``to`` is as the command line explains. Returns what was written, kept and changed, in lines.

    Raises:
        ValueError: if ``dst`` is not empty, ``src`` is not a valid checkpoint or already has extra
            heads, ``n_future_tokens`` does not fit, or another process has meanwhile made something
            else in ``dst``.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} is not an empty folder: give a new one")
    if to != "mtp" and n_future_tokens is not None:
        raise ValueError(
            "--n-future-tokens requires --to mtp: otherwise the heads are those of SRC"
        )
    if to == "mtp":
        if is_meta(src):
            raise ValueError(
                f"{src} is in Meta's format: --to mtp starts from a Hugging Face Llama"
            )
        n_future_tokens = 4 if n_future_tokens is None else n_future_tokens
        if n_future_tokens < 2:
            raise ValueError(
                f"--n-future-tokens must be at least 2 with --to mtp, got {n_future_tokens}"
            )
    checkpoint = Checkpoint(src, n_future_tokens)
    if to == "mtp" and checkpoint.has_heads:
        raise ValueError(f"{src} has extra heads already: --to meta keeps them")
    if to in ("hf-mtp", "eagle3") and not checkpoint.has_heads:
        raise ValueError(
            f"{src} has one head: --to {to} needs extra heads, which --to mtp makes and training "
            "fills"
        )
    keys = [key for key in parameter_shapes(checkpoint.args) if _takes(to, key)]
    size = sum(checkpoint.read(key).nbytes for key in keys)
    tensors = ((key, checkpoint.read(key)) for key in keys)
    WRITE[to](
        Adapter(adapter, checkpoint.args).merged(tensors) if adapter else tensors,
        checkpoint.args,
        dst,
        checkpoint.tokenizer_path,
        bar_bytes=size if size > LARGE else None,
        replace=False,  # another process may have written it by now
    )
    heads = 1 if to == "hf" else checkpoint.args["n_future_tokens"]
    trunk = checkpoint.args["num_layers"] - checkpoint.args["n_future_tokens"]
    layout = "Hugging Face" if WRITE[to] is not write_meta else "Meta"
    what = f"{trunk} trunk blocks, {heads} head(s)"
    if to == "eagle3":
        what = f"head 1 as an EAGLE-3 draft that reads the output of {trunk} trunk blocks"
    dtypes = sorted({str(checkpoint.read(key).dtype).removeprefix("torch.") for key in keys})
    return (
        f"{dst}: {layout} format, {what}, {size / 1e9:.2f} GB\n"
        f"{_kept(checkpoint.args, dtypes)}\n{_left_out(src, dst, checkpoint, to)}"
    )


def _takes(to: str, key: str) -> bool:
    """Whether a format has one of our parameters."""
    if to == "eagle3":
        return key.startswith(("heads.1.", "output."))
    return to != "hf" or not is_extra_head(key)


def _kept(args: dict, dtypes: list[str]) -> str:
    """What of the source's facts the copy has, whatever the format."""
    scaling, told = args["rope_scaling"], ""
    if scaling:
        told = (
            f", scaled as Llama 3's by {scaling['factor']:g} from "
            f"{scaling['original_max_position_embeddings']:g} tokens"
        )
    return (
        f"Kept: {args['vocab_size']} pieces (tokenizer.model), context of {args['max_seq_len']} "
        f"tokens, rotary base {args['rope_base']:g}{told}, width {args['embed_dim']} and "
        f"{args['intermediate_dim']}, {args['num_heads']} heads of queries and "
        f"{args['num_kv_heads']} of keys and values, norm_eps {args['norm_eps']:g}, "
        f"{' and '.join(dtypes)}"
    )


def _left_out(src: Path, dst: Path, checkpoint: Checkpoint, to: str) -> str:
    """What the copy does not have, and names that have changed."""
    config, extra = read_json(checkpoint.config_file), checkpoint.args["n_future_tokens"] - 1
    told = []
    if extra and to in ("hf", "mtp"):
        did = "left out" if to == "hf" else "made, copies of the last block"
        told.append(f"{extra} extra head(s) {did}")
    if to == "eagle3":
        told.append(f"trunk, head 0 and {extra - 1} extra head(s) left out: serve --to hf with it")
    if config.get("tie_word_embeddings"):
        told.append("embedding and output are two tensors now")
    if config.get("model_type") not in (None, "llama"):
        told.append(f"model_type {config['model_type']} is llama's")
    made = {path.name for path in dst.iterdir()} | {checkpoint.config_file.name}
    weights = {path.name for path in weight_files(src)}
    others = [p.name for p in _visible(src) if p.name not in made | weights]
    if others:
        told.append(f"not copied: {', '.join(others)}")
    return "Changed: " + ("; ".join(told) if told else "nothing else")


def _visible(folder: Path) -> list[Path]:
    """Files of a folder, without hidden ones and indices of weights."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [p for p in files if p.name[0] != "." and not p.name.endswith(".index.json")]


def main(argv: list[str] | None = None, *, prog: str = "python -m wmtp_modules.convert") -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Convert a checkpoint folder. Runs on the CPU, tensor by tensor from the "
        "memory-mapped file; the dtype stays as stored.",
        epilog="SRC is a folder in Meta's format (params.json, consolidated.pth, tokenizer.model) "
        "or a Hugging Face Llama (config.json, safetensors, tokenizer.model).",
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="checkpoint folder to read")
    parser.add_argument("dst", metavar="DST", type=Path, help="new or empty folder to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(WRITE),
        help="meta: Meta's format with the heads of SRC. hf: an ordinary Hugging Face Llama of "
        "trunk and head 0, for transformers and vLLM. mtp: a multi-token starting model in Meta's "
        "format, made from a Hugging Face Llama by copying its last block into the extra heads. "
        "hf-mtp: a Hugging Face folder with all heads and the code with which transformers "
        "decodes self-speculatively. eagle3: head 1 as an EAGLE-3 draft, to be served with the "
        "model of --to hf",
    )
    parser.add_argument(
        "--n-future-tokens",
        type=int,
        metavar="N",
        help="heads of the model that --to mtp makes (default 4)",
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        type=Path,
        help="adapters that a run with `lora` has left (best/ or last/), to be merged into SRC",
    )
    args = parser.parse_args(argv)
    n_heads = args.n_future_tokens
    try:
        print(
            convert(args.src, args.dst, to=args.to, n_future_tokens=n_heads, adapter=args.adapter)
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
