"""Writes an ordinary Hugging Face Llama, made of trunk and head 0: weights, configs, tokenizer."""

import json
from collections import Counter
from collections.abc import Iterable
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

HF_SHARD_BYTES = 5_000_000_000  # the usual size of Hugging Face's shards


def write_hf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    args: dict,
    folder: Path,
    tokenizer_path: Path,
    *,
    bar_bytes: int | None = None,
    replace: bool = True,
) -> None:
    """Write safetensors, configs and tokenizer of an ordinary Llama: trunk and head 0.

    Shards of about 5 GB are written as the tensors come, so no more than one is held. See
    ``write_meta`` for the arguments; extra heads are passed over. Tensors keep their dtypes;
    ``config.json`` names the one that most parameters have.
    """
    with checkpoint_folder(folder, tokenizer_path, replace) as partial:
        write_hf_tokenizer(tokenizer_path, partial, max_seq_len=args["max_seq_len"])
        n_trunk = args["num_layers"] - args["n_future_tokens"]
        head_dim = args["embed_dim"] // args["num_heads"]
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
            for key, tensor in tensors:
                if is_extra_head(key):
                    continue
                heads = rotary_heads(key, args)
                if heads is not None:
                    tensor = tensor[rows_to_hf(heads, head_dim)]
                if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > HF_SHARD_BYTES:
                    flush(bar)
                # Tied embeddings come as one tensor twice, which safetensors refuses to write.
                twice = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
                shard[hf_key(key, n_trunk)] = tensor.clone() if twice else tensor.contiguous()
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

        tokenizer = spm.SentencePieceProcessor(model_file=str(tokenizer_path))
        special = {"bos_token_id": tokenizer.bos_id(), "eos_token_id": tokenizer.eos_id()}
        scaling = args.get("rope_scaling")
        rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **special,
            "vocab_size": args["vocab_size"],
            "hidden_size": args["embed_dim"],
            "intermediate_size": args["intermediate_dim"],
            "num_hidden_layers": n_trunk + 1,
            "num_attention_heads": args["num_heads"],
            "num_key_value_heads": args["num_kv_heads"],
            "head_dim": head_dim,
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
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        (partial / "generation_config.json").write_text(json.dumps(special, indent=2))
