"""Writes Hugging Face folders: an ordinary Llama of trunk and head 0, one with all heads and the
code that runs them (``hf_mtp``), and head 1 as an EAGLE-3 draft beside an ordinary Llama.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm
import torch
from safetensors.torch import save_file
from torchtune.utils import get_logger
from tqdm import tqdm

from wmtp_modules.checkpoints.hf_tokenizer import write_hf_tokenizer
from wmtp_modules.checkpoints.names import hf_key, is_extra_head, rotary_heads, rows_to_hf
from wmtp_modules.checkpoints.write import checkpoint_folder, writing_bar
from wmtp_modules.files import disk_errors

log = get_logger("INFO")

HF_MTP_CODE = ("modeling_llama_mtp.py", "decoding_llama_mtp.py", "custom_generate/generate.py")
HF_SHARD_BYTES = 5_000_000_000  # the usual size of Hugging Face's shards


def write_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    args: dict,
    folder: Path,
    tokenizer_path: Path,
    *,
    bar_bytes: int | None = None,
    replace: bool = True,
    all_heads: bool = False,
) -> None:
    """Write safetensors, configs and tokenizer of an ordinary Llama: trunk and head 0.

    Shards of about 5 GB are written as the tensors come, so no more than one is held. See
    ``write_meta`` for the arguments. Extra heads are passed over, or with ``all_heads`` written
    too, with the code of ``hf_mtp`` that runs them. Tensors keep their dtypes; ``config.json``
    names the one that most parameters have.
    """
    n_trunk = args["num_layers"] - args["n_future_tokens"]
    with checkpoint_folder(folder, tokenizer_path, replace) as partial:
        write_hf_tokenizer(tokenizer_path, partial, max_seq_len=args["max_seq_len"])
        named = (
            (hf_key(key, n_trunk, all_heads=all_heads), tensor)
            for key, tensor in _in_hf_order(tensors, args)
            if all_heads or not is_extra_head(key)
        )
        dtype = _write_shards(named, partial, folder, bar_bytes)
        config = _config(args, tokenizer_path, n_blocks=n_trunk + 1, dtype=dtype)
        if all_heads:
            for name in HF_MTP_CODE:
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(__file__).parent / "hf_mtp" / name, partial / name)
            # What knows no such class, or may not run the folder's code, reads trunk and head 0.
            config |= {
                "architectures": ["LlamaMTPForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "modeling_llama_mtp.LlamaMTPForCausalLM"},
                "n_future_tokens": args["n_future_tokens"],
            }
        _write_configs(partial, config)


def write_eagle3(
    tensors: Iterable[tuple[str, torch.Tensor]],
    args: dict,
    folder: Path,
    tokenizer_path: Path,
    *,
    bar_bytes: int | None = None,
    replace: bool = True,
) -> None:
    """Write head 1 as an EAGLE-3 draft of the ordinary Llama that ``write_hf`` makes.

    Its logits are head 1's, in servers that compute what these do (vLLM 0.33.0 and SGLang 0.5.23,
    each ``models/llama_eagle3.py``). The draft's block reads the target's hidden state through
    ``fc``, and q, k and v read [norm(embedding), norm(hidden state)]: ``fc`` is the identity, and
    the columns of the embedding are zero. Every token may be drafted, so there is no ``d2t``.

    See ``write_meta`` for the arguments; only head 1, norm and output are read of ``tensors``.
    """
    n_trunk, dim = args["num_layers"] - args["n_future_tokens"], args["embed_dim"]

    def draft() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in _in_hf_order(tensors, args):
            if key.startswith("output."):
                yield hf_key(key, n_trunk).removeprefix("model."), tensor
            if not key.startswith("heads.1."):
                continue
            name = hf_key(key, n_trunk, all_heads=True).replace("extra_heads.0", "midlayer")
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensor = torch.cat([torch.zeros_like(tensor), tensor], dim=1)
            if name == "midlayer.input_layernorm.weight":  # of the embedding, which nothing reads
                yield name, torch.ones_like(tensor)
                yield "fc.weight", torch.eye(dim, dtype=tensor.dtype)
                name = "midlayer.hidden_norm.weight"
            yield name, tensor

    with checkpoint_folder(folder, tokenizer_path, replace) as partial:
        dtype = _write_shards(draft(), partial, folder, bar_bytes)
        config = _config(args, tokenizer_path, n_blocks=1, dtype=dtype) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": args["vocab_size"],
            # The trunk's output: what goes into block n_trunk (vLLM), what comes out of the block
            # before it (SGLang).
            "eagle_aux_hidden_state_layer_ids": [n_trunk],
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [n_trunk - 1],
                "use_aux_hidden_state": True,
            },
        }
        _write_configs(partial, config)


def _in_hf_order(
    tensors: Iterable[tuple[str, torch.Tensor]], args: dict
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our keys, with the rows of q and k as Hugging Face's rotary embedding wants them."""
    for key, tensor in tensors:
        heads = rotary_heads(key, args)
        if heads is not None:
            tensor = tensor[rows_to_hf(heads, args["embed_dim"] // args["num_heads"])]
        yield key, tensor


def _write_shards(
    named: Iterable[tuple[str, torch.Tensor]], partial: Path, folder: Path, bar_bytes: int | None
) -> str:
    """Write tensors under these names into ``partial``; the dtype that most parameters have."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = 0
    by_dtype = Counter[str]()

    def flush(bar: tqdm) -> None:
        with disk_errors():
            save_file(shard, partial / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        bar.update(sum(tensor.nbytes for tensor in shard.values()))
        shards.append(list(shard))
        shard.clear()

    with writing_bar(bar_bytes) as bar:
        for name, tensor in named:
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > HF_SHARD_BYTES:
                flush(bar)
            # Tied embeddings come as one tensor twice, which safetensors refuses to write.
            twice = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
            shard[name] = tensor.clone() if twice else tensor.contiguous()
            total += tensor.nbytes
            by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        flush(bar)
    dtype = by_dtype.most_common(1)[0][0]
    if len(by_dtype) > 1:
        told = ", ".join(f"{count:,} in {name}" for name, count in by_dtype.most_common())
        log.info(f"{folder}: parameters of several dtypes ({told}): config.json says {dtype}")

    weight_map = {}
    for i, keys in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (partial / f"{i}.safetensors").rename(partial / name)
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total, "total_parameters": by_dtype.total()},
            "weight_map": weight_map,
        }
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return dtype


def _config(args: dict, tokenizer_path: Path, *, n_blocks: int, dtype: str) -> dict:
    """``config.json`` of an ordinary Llama of so many blocks."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(tokenizer_path))
    scaling = args.get("rope_scaling")
    rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": tokenizer.bos_id(),
        "eos_token_id": tokenizer.eos_id(),
        "vocab_size": args["vocab_size"],
        "hidden_size": args["embed_dim"],
        "intermediate_size": args["intermediate_dim"],
        "num_hidden_layers": n_blocks,
        "num_attention_heads": args["num_heads"],
        "num_key_value_heads": args["num_kv_heads"],
        "head_dim": args["embed_dim"] // args["num_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": args["max_seq_len"],
        "rms_norm_eps": args["norm_eps"],
        # Read by transformers 4 and 5 and by the versions of vLLM that go with each.
        "rope_theta": args["rope_base"],
        "rope_parameters": rope | {"rope_theta": args["rope_base"]},
        **({"rope_scaling": rope} if scaling else {}),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _write_configs(partial: Path, config: dict) -> None:
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (partial / "generation_config.json").write_text(json.dumps(special, indent=2))
