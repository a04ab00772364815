"""Writes a checkpoint folder in Meta's release format, whole or not at all.

A sharded model is gathered one parameter at a time, so that no rank needs memory for all of it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from wmtp_modules.checkpoints.adapter import ADAPTER_CONFIG, write_adapter
from wmtp_modules.checkpoints.names import is_extra_head, meta_key
from wmtp_modules.checkpoints.read import (
    META_CONTEXT,
    check_vocab,
    meta_hidden_dim,
)
from wmtp_modules.files import disk_errors, new_folder
from wmtp_modules.models.lora import A, B, is_adapter, merged_weight
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import share_from_rank_zero
from wmtp_modules.progress import progress_bar


def save_meta(
    model: MTPTransformer, folder: str | Path, *, tokenizer_path: str | Path, dtype: torch.dtype
) -> None:
    """Write all heads as a folder in Meta's format; all ranks call it.

    Parameters, sharded or not, are gathered one at a time; rank 0 keeps them on the CPU, in
    ``dtype``, and writes. The folder appears under its name when it is complete, in place of an
    earlier checkpoint. Where the model has ``read_frozen``, all but heads 1 to K - 1 is copied from
    there, and these are in the dtype that they have there: a frozen trunk keeps its bits, whatever
    computed with it. Adapters are merged in fp32 before that, and stand beside the model by
    themselves (``write_adapter``), or alone if ``model.lora`` says so.

    Raises:
        ValueError: if the tokenizer is not the model's, or ``folder`` holds something else.
    """
    folder, tokenizer_path = Path(folder), Path(tokenizer_path)
    check_vocab(tokenizer_path, model.args["vocab_size"])
    _check_replaceable(folder)
    tensors = _whole_tensors(model, dtype)
    args = model.args | {"max_seq_len": model.context}
    lora, adapter = model.lora, _whole_adapter(model)

    def write() -> None:
        if lora is None:
            write_meta(tensors, args, folder, tokenizer_path)
        elif lora.save_adapter_only:
            with new_folder(folder) as unfinished:
                write_adapter(unfinished, lora, adapter, args)
        else:
            beside = partial(write_adapter, lora=lora, tensors=adapter, args=args)
            write_meta(tensors, args, folder, tokenizer_path, beside=beside)

    if lora and lora.save_adapter_only:
        tensors = iter(())  # nothing to gather
    if not dist.is_initialized():
        write()
        return
    problem = None
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            problem = error
    for _ in tensors:  # every rank takes part in the gathers, also in what an error left of them
        pass
    # A full disk is rank 0's alone, but the others must not wait for what does not come.
    told = share_from_rank_zero(str(problem) if problem else None)
    if told:
        raise OSError(told) from problem


def write_meta(
    tensors: Iterable[tuple[str, torch.Tensor]],
    args: dict,
    folder: Path,
    tokenizer_path: Path,
    *,
    bar_bytes: int | None = None,
    replace: bool = True,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write ``consolidated.pth``, ``params.json`` and ``tokenizer.model``.

    ``tensors`` are our key and whole CPU tensor of each parameter, mapped from a file or not;
    ``bar_bytes`` will be written, to show a progress bar (None shows none). ``replace`` is that of
    ``new_folder``; ``beside`` writes more into the folder.
    """
    n_trunk = args["num_layers"] - args["n_future_tokens"]
    state = {meta_key(key, n_trunk): _with_own_storage(tensor) for key, tensor in tensors}
    params: dict[str, Any] = {
        "dim": args["embed_dim"],
        "n_layers": args["num_layers"],
        "n_heads": args["num_heads"],
        "n_kv_heads": args["num_kv_heads"],
        "n_future_tokens": args["n_future_tokens"],
        "rope_theta": args["rope_base"],
        "norm_eps": args["norm_eps"],
        "vocab_size": args["vocab_size"],
        **_meta_hidden_fields(args["embed_dim"], args["intermediate_dim"]),
    }
    if args.get("rope_scaling"):
        # Meta's name says that there is one, ours which.
        params |= {"use_scaled_rope": True, "rope_scaling": args["rope_scaling"]}
    if args["max_seq_len"] != META_CONTEXT:
        params["max_seq_len"] = args["max_seq_len"]
    with checkpoint_folder(folder, tokenizer_path, replace) as unfinished:
        with (
            disk_errors(),
            (unfinished / "consolidated.pth").open("wb") as file,
            writing_bar(bar_bytes) as bar,
        ):
            torch.save(state, CallbackIOWrapper(bar.update, file, "write"))
        (unfinished / "params.json").write_text(json.dumps(params, indent=2))
        if beside:
            beside(unfinished)


def writing_bar(n_bytes: int | None) -> tqdm:
    """A bar of bytes; none is shown for None."""
    return progress_bar(
        desc="writing", total=n_bytes, unit="B", unit_scale=True, shown=n_bytes is not None
    )


@torch.no_grad()
def _whole_tensors(model: MTPTransformer, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    state = model.state_dict()
    for key, parameter in state.items():
        layer = key.removesuffix("weight")
        if model.read_frozen:
            start = model.read_frozen(key)
            is_frozen = not is_extra_head(key)
            yield key, start if is_frozen else _whole(parameter.to(start.dtype)).cpu()
            continue
        if is_adapter(key):
            continue
        if model.lora and layer + A in state:
            parts = (_whole(state[name]) for name in (key, layer + A, layer + B))
            yield key, merged_weight(*parts, alpha=model.lora.alpha).to(dtype).cpu()
        else:
            yield key, _whole(parameter.to(dtype)).cpu()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _whole_adapter(model: MTPTransformer) -> dict[str, torch.Tensor]:
    """Adapters by our key, on the CPU; a collective."""
    state = model.state_dict() if model.lora else {}
    return {key: _whole(value).cpu() for key, value in state.items() if is_adapter(key)}


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage that holds nothing else.

    torch.save writes whole storages, and each only once: a view would drag its base along, and
    heads that start as copies of one block would come back from the file tied to each other.
    """
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


@contextmanager
def checkpoint_folder(folder: Path, tokenizer_path: Path, replace: bool) -> Iterator[Path]:
    """``new_folder`` in place of an earlier checkpoint only, holding the tokenizer."""
    _check_replaceable(folder)
    with new_folder(folder, replace=replace) as unfinished:
        shutil.copyfile(tokenizer_path, unfinished / "tokenizer.model")
        yield unfinished


def _check_replaceable(folder: Path) -> None:
    names = ("params.json", "config.json", ADAPTER_CONFIG)
    ours = any((folder / name).exists() for name in names)
    if not ours and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something other than a checkpoint: use another path")


def _meta_hidden_fields(dim: int, hidden: int) -> dict[str, int | float]:
    """Fields of params.json from which the rule above gives ``hidden``."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if meta_hidden_dim(dim, multiple_of, 1.0) == hidden:
            return {"multiple_of": multiple_of}
    # The half keeps the product clear of the next integer whatever the rounding.
    multiplier = (hidden + 0.5) / int(2 * 4 * dim / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
