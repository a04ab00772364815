"""Adapters by themselves: written beside a model or alone, read again and merged into their base.

``adapter_model.safetensors`` and ``adapter_config.json`` are PEFT's format, as torchtune writes it,
for trunk and head 0, which are an ordinary Llama: PEFT and vLLM load them on the base converted by
``--to hf``. What no Llama has, heads 1 to K - 1, is in a file of its own, under our keys.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wmtp_modules.checkpoints.names import (
    hf_key,
    is_extra_head,
    parameter_shapes,
    rotary_heads,
    rows_from_hf,
    rows_to_hf,
)
from wmtp_modules.files import disk_errors
from wmtp_modules.models.lora import A, B, LoRA, merged_weight, quantised_and_back

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
EXTRA_HEADS_FILE = "adapter_extra_heads.safetensors"
OURS = "wmtp"  # of the file's metadata: what PEFT's config has no word for
NOTHING = torch.empty(0)


def write_adapter(folder: Path, lora: LoRA, tensors: dict[str, torch.Tensor], args: dict) -> None:
    """Write the files into a folder that is there.

    Args:
        tensors: A and B of each adapted layer, whole, on the CPU, under our keys.
        args: of ``mtp_llama2``.
    """
    peft, extra = {}, {}
    for key, tensor in tensors.items():
        if is_extra_head(key):
            extra[key] = tensor.contiguous()
            continue
        layer, part = _parts(key)
        if part == B and (rows := _rows(layer, args, rows_to_hf)) is not None:
            tensor = tensor[rows]
        peft[_peft_key(key, args)] = tensor.contiguous()
    ours = json.dumps(asdict(lora))
    with disk_errors():
        for name, content in ((ADAPTER_FILE, peft), (EXTRA_HEADS_FILE, extra)):
            if content or name == ADAPTER_FILE:
                save_file(content, folder / name, metadata={"format": "pt", OURS: ours})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [_peft_name(name) for name in lora.names],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


class Adapter:
    """A folder's adapters, for a base whose builder's arguments are ``args``.

    Raises:
        ValueError: if a file is missing or damaged, or they are of another model.
    """

    def __init__(self, folder: str | Path, args: dict) -> None:
        folder = Path(folder)
        tensors, metadata = _read(folder / ADAPTER_FILE)
        if OURS not in metadata:
            raise ValueError(
                f"{folder / ADAPTER_FILE} was not written by this package: merge it with PEFT"
            )
        self.lora = LoRA(**json.loads(metadata[OURS]))
        if self.lora.heads and args["n_future_tokens"] > 1:
            tensors |= _read(folder / EXTRA_HEADS_FILE)[0]
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, (out, width) in _matrices(args):
            if not self.lora.adapts(key):
                continue
            layer = key.removesuffix("weight")
            a, b = (tensors.get(_file_key(layer + part, args), NOTHING) for part in (A, B))
            found, rank = (tuple(a.shape), tuple(b.shape)), self.lora.rank
            if found != ((rank, width), (out, rank)):
                raise ValueError(
                    f"{folder} holds adapters of another model: of {key} their shapes are {found}, "
                    f"and the base needs {((rank, width), (out, rank))}"
                )
            if not is_extra_head(key) and (rows := _rows(key, args, rows_from_hf)) is not None:
                b = b[rows]
            self._pairs[key] = a, b

    def merged(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's tensors by our key with the adapters in them, each in the dtype that it had.

        Of QLoRA the weights are rounded to NF4 first: with these the adapters were trained.
        """
        for key, weight in tensors:
            if key in self._pairs:
                base = quantised_and_back(weight) if self.lora.quantize_base else weight
                whole = merged_weight(base, *self._pairs[key], alpha=self.lora.alpha)
                weight = whole.to(weight.dtype)
            yield key, weight


def _parts(key: str) -> tuple[str, str]:
    """The weight that an adapter's key belongs to, and which of the two it is."""
    part = A if key.endswith(A) else B
    return key.removesuffix(part) + "weight", part


def _peft_key(key: str, args: dict) -> str:
    weight, part = _parts(key)
    n_trunk = args["num_layers"] - args["n_future_tokens"]
    layer = hf_key(weight, n_trunk).removesuffix("weight")
    return f"base_model.model.{layer}{part.replace('_a', '_A').replace('_b', '_B')}"


def _file_key(key: str, args: dict) -> str:
    return key if is_extra_head(key) else _peft_key(key, args)


def _peft_name(name: str) -> str:
    folder = "mlp" if name.startswith("w") else "attn"
    return hf_key(f"layers.0.{folder}.{name}.weight", 1).split(".")[-2]


def _rows(key: str, args: dict, order) -> torch.Tensor | None:
    heads = rotary_heads(key, args)
    return None if heads is None else order(heads, args["embed_dim"] // args["num_heads"])


def _matrices(args: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((key, shape) for key, shape in parameter_shapes(args).items() if len(shape) == 2)


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing, truncated or damaged: {error}") from error
