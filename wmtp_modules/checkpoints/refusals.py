"""Says what a folder or a file is that is no checkpoint or tokenizer, and the way out.

Only names, keys and the first bytes of files are looked at.
"""

import re
from pathlib import Path

from wmtp_modules.checkpoints.names import HUGGING_FACE, LAYOUTS, META
from wmtp_modules.files import read_json, stand_in

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".distcp"}
# What wraps a module puts its name into the keys below.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_fsdp_wrapped_module": "FSDP",
    "module": "DistributedDataParallel or DeepSpeed",
    "base_model": "PEFT",
}
_ADAPTER = re.compile(r".*\b(lora_\w+|ia3_\w+|base_layer|modules_to_save|prompt_embeddings)\b")
_QUANTISED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_scale\w*|SCB|absmax|quant_\w+).*")
# Families of Hugging Face's that are a Llama under another name, and what others have beyond one.
SAME_AS_LLAMA = ("llama", "mistral")
NEEDS = {
    "qwen3": "norms of queries and keys",
    "qwen": "biases of queries, keys and values",
    "gemma": "scaled embeddings, GELU and norms of its own",
    "mixtral": "experts",
    "deepseek": "latent attention and experts",
    "phi": "other projections and norms",
    "gpt": "another block: LayerNorm, GELU and other positions",
    "granite": "multipliers of its own",
    "olmo": "norms of its own",
    "cohere": "parallel blocks and LayerNorm",
}
NEEDED_BY = {
    "sliding_window": ", which needs attention to the last tokens only",
    "rope_type": ", a rotary embedding of its own",
    "head_dim": ", which is not the width over the heads",
}
# Tables that some exporters store beside the weights; the model computes them.
KNOWN_BUFFERS = re.compile(r"rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
MAX_NAMES = 10  # in one message


def needs_of(family: object) -> str:
    """What a family of models has that a Llama has not, by the beginning of its name."""
    name = str(family).lower()
    return next((NEEDS[key] for key in NEEDS if name.startswith(key)), "a model of its own")


def foreign_keys(files: str, keys: list[str], config: dict, config_file: Path) -> str | None:
    """What other format or wrapper wrote the keys of ``files``, with the way out, or None.

    Args:
        keys: of all tensors. Those that only few others accompany are left to the comparison with
            the config.
        config: what is in ``config_file``, which also says which format the folder claims to be.
    """
    own_name = META if config_file.name == "params.json" else HUGGING_FACE
    own = LAYOUTS[own_name]
    strange = [k for k in keys if not own.fullmatch(k) and not KNOWN_BUFFERS.fullmatch(k)]
    for key in strange:
        if _ADAPTER.match(key):
            return (
                f"{files} holds an adapter and not, or not yet, a whole model (key {key}): "
                "merge it into its base model, as PEFT's merge_and_unload() does, and save that"
            )
    quantised = next((key for key in strange if _QUANTISED.match(key)), None)
    fields = [f for f in ("quantization_config", "quantization_args") if config.get(f)]
    if quantised or fields:
        why = f"key {quantised}" if quantised else f"{fields[0]} in {config_file.name}"
        return (
            f"{files} holds quantised weights ({why}), which cannot be trained: take the "
            "checkpoint that they were made from"
        )
    for layout, pattern in LAYOUTS.items():
        theirs = [key for key in strange if pattern.fullmatch(key)]
        if len(theirs) > len(keys) / 2:
            its_config = {META: "params.json", HUGGING_FACE: "config.json"}.get(layout)
            return (
                f"{files} holds keys of {layout} format ({theirs[0]}), but "
                f"{config_file.name} is there for {own_name} format: "
                + (f"copy {its_config} in its place" if its_config else "export it in that")
            )
    all_keys = set(keys)
    inner = {key: _inner_key(key, own) for key in strange}
    wrapped = {key: name for key, name in inner.items() if name and name not in all_keys}
    if wrapped and len(wrapped) >= len(strange) / 2:
        key, name = next(iter(wrapped.items()))
        maker = next((WRAPPERS[part] for part in key.split(".") if part in WRAPPERS), None)
        if key.endswith(name):
            how = f"begin with {key.removesuffix(name)!r}"
        elif name.endswith(key):
            how = f"lack the prefix {name.removesuffix(key)!r}"
        else:
            how = "hold the name of a wrapper"
        return (
            f"{files}: {len(wrapped)} of {len(keys)} keys {how}"
            + (f", which {maker} puts there" if maker else "")
            + f": rename them ({key} must be {name}), or save the unwrapped model again"
        )
    return None


def _inner_key(key: str, own: re.Pattern[str]) -> str | None:
    """The key of a format that another one stands for: without wrappers, prefix, or a lost one."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    names = [".".join(parts[start:]) for start in range(len(parts))] + [".".join(["model", *parts])]
    return next((name for name in names if own.fullmatch(name)), None)


ADAPTER_ONLY = (
    "{} is an adapter without its base model: merge it into that, as `convert --adapter` does for "
    "this package's and PEFT's merge_and_unload() for others, and save the result"
)


def weight_files(folder: Path) -> list[Path]:
    """Files of a folder that may be weights, without what a trainer keeps beside them."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in WEIGHT_SUFFIXES
        and not re.match("optimizer|scheduler|scaler|rng_state|training_args", path.name)
    )


def which_weights(files: list[Path]) -> str:
    """Weight files that are there, to follow which one is not."""
    names = ", ".join(file.name for file in files[:MAX_NAMES])
    return f", where there is {names}" if names else ", and there are no other weights"


def what_is_there(folder: Path) -> str:
    """What a folder holds that is no checkpoint, and what to give in its place."""
    if not folder.is_dir():
        what = "it is a file, give its folder" if folder.exists() else "there is no such folder"
        return what if not folder.is_symlink() else f"it is {stand_in(folder)}"
    neither = "it has neither params.json (Meta's format) nor config.json (Hugging Face)"
    for path in (folder / "params.json", folder / "config.json"):
        if path.is_symlink():
            return f"{path} is {stand_in(path)}"
    inner = [path.parent for n in ("params.json", "config.json") for path in folder.glob(f"*/{n}")]
    inner += [path.parent for path in folder.glob("snapshots/*/config.json")]
    there = weight_files(folder)
    adapter = next((file.name for file in there if file.name.startswith("adapter_model")), None)
    if adapter or (folder / "adapter_config.json").exists():
        return f"{neither}, and {ADAPTER_ONLY.format(adapter or 'adapter_config.json')}"
    if any(file.suffix == ".distcp" for file in there):
        return (
            f"{neither}, but the parts of torch.distributed.checkpoint: convert them with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch, and add the config"
        )
    if any(file.suffix == ".gguf" for file in there):
        return f"{neither}, but {there[0].name}: take the version in safetensors"
    if inner:
        return f"{neither}, but {inner[0]} has: give that folder"
    return neither + (f"{which_weights(there)}: copy its config beside it" if there else "")


def in_two_files(key: str, one: Path, other: Path) -> str:
    """What to say of a key that no index settles."""
    return (
        f"key {key} is in {one.name} and in {other.name} of {one.parent}, and no index says which "
        "counts: move the file that is not part of this checkpoint away"
    )


def tokenizer_fault(path: Path) -> str | None:
    """What a file is that cannot be a SentencePiece model, with the way out; None if it may be."""
    if not path.exists() and not path.is_symlink():
        return no_tokenizer(path)
    found = stand_in(path)
    if found:
        return f"is not a SentencePiece model but {found}"
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "is not a SentencePiece model: it is empty, copy it again"
    ours = "take tokenizer.model, a SentencePiece model as Llama 1 and 2 have it"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return (
            "is not a SentencePiece model but a tiktoken vocabulary, as Llama 3 has it, which is "
            f"not supported: {ours}, with a checkpoint that was trained with it"
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*[{\[]", head):
        return (
            "is not a SentencePiece model but JSON, such as Hugging Face's tokenizer.json: "
            f"{ours}, of the same checkpoint"
        )
    if re.match(rb"[^\x00-\x08\n]+\t-?[\d.e-]+\r?\n", head):
        return (
            "is not a SentencePiece model but a listing of its pieces: take the .model file that "
            "was written beside it"
        )
    return None


def no_tokenizer(path: Path) -> str:
    """What to say of a tokenizer that is not there."""
    if path.is_symlink():
        return f"is {stand_in(path)}"
    has_json = (path.parent / "tokenizer.json").exists()
    beside = ", tokenizer.json beside it is another format" if has_json else ""
    there = "" if path.parent.is_dir() else f", and neither is its folder {path.parent}"
    return (
        f"is missing: that file does not exist{beside}{there}. Copy the checkpoint's SentencePiece "
        "model (tokenizer.model) there, or correct the path"
    )


def added_tokens(folder: Path, n_pieces: int) -> list[str]:
    """Tokens that Hugging Face's files add to a SentencePiece model; as far as they can be read."""
    by_id: dict[int, str] = {}
    if (folder / "added_tokens.json").exists():
        tokens = read_json(folder / "added_tokens.json")
        by_id |= {i: token for token, i in tokens.items() if isinstance(i, int)}
    if (folder / "tokenizer_config.json").exists():
        tokens = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for i, token in tokens.items() if isinstance(tokens, dict) else ():
            if i.isdecimal() and isinstance(token, dict):
                by_id[int(i)] = str(token.get("content"))
    return [token for i, token in sorted(by_id.items()) if i >= n_pieces]
