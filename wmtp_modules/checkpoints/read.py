"""Reads checkpoint folders, Meta's release format and Hugging Face Llama, into a model.

Reading goes straight from memory-mapped files into the parameters, each rank touching only the
rows of its own shards. Whatever is wrong with a folder shows in file headers, so each rank finds
the same error by itself, before any memory is spent.
"""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils import swap_tensors
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules import RotaryPositionalEmbeddings

from wmtp_modules.checkpoints.names import (
    hf_key,
    meta_key,
    parameter_shapes,
    rotary_heads,
    rows_from_hf,
)
from wmtp_modules.checkpoints.refusals import (
    ADAPTER_ONLY,
    KNOWN_BUFFERS,
    NEEDED_BY,
    SAME_AS_LLAMA,
    added_tokens,
    foreign_keys,
    in_two_files,
    needs_of,
    no_tokenizer,
    tokenizer_fault,
    weight_files,
    what_is_there,
    which_weights,
)
from wmtp_modules.files import read_json, recover_folder, stand_in
from wmtp_modules.models.lora import is_adapter
from wmtp_modules.models.model_builders import LLAMA3_SCALING, check_rope_scaling
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.sharding import local_rows

MAX_PROBLEMS = 10  # named in one error message; the others are counted
# Meta's params.json does not name the context length; Llama-2 and the multi-token release have
# 4096. Another one is written as max_seq_len, which Meta's own loader would not take.
META_CONTEXT = 4096
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEW_TOKENS = 256  # as many rows are added or padded; a larger difference is another tokenizer
MOST = 2**31 - 1  # in a config: a size beyond it is a slip, and would be tried


class Checkpoint:
    """A checkpoint folder that is known to be complete, read tensor by tensor under our keys.

    Args:
        folder: Meta's format (``params.json``, ``consolidated.pth``) or Hugging Face's
            (``config.json``, safetensors or torch weights, whole or sharded), with
            ``tokenizer.model``.
        n_future_tokens: heads; None takes what the folder has. For a Hugging Face folder more than
            one starts a multi-token model: its last block is copied into the extra heads, which
            come on top of its blocks, unless it has extra heads itself (``convert --to hf-mtp``).

    Attributes:
        args: arguments of ``mtp_llama2``; ``max_seq_len`` is the folder's context length.
        has_heads: whether it has extra heads, in either format.

    Raises:
        ValueError: if the folder is incomplete, damaged or of neither format, carries code, names
            files outside of it, or its keys, shapes, dtypes, heads or vocabulary do not fit.
    """

    def __init__(self, folder: str | Path, n_future_tokens: int | None = None) -> None:
        folder = Path(folder)
        recover_folder(folder)
        if is_meta(folder):
            self.is_hf = False
            self.config_file = folder / "params.json"
            self._files, self._index = _consolidated_files(folder), {}
        elif (folder / "config.json").exists():
            self.is_hf = True
            self.config_file = folder / "config.json"
            self._files, self._index = _hf_weight_files(folder)
        else:
            raise ValueError(f"{folder} is not a checkpoint: {what_is_there(folder)}")
        self.tokenizer_path = folder / "tokenizer.model"
        if not self.tokenizer_path.exists():
            raise ValueError(f"{self.tokenizer_path} {no_tokenizer(self.tokenizer_path)}")

        self._tensors: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, Path] = {}
        self._copies: dict[str, Path] = {}  # keys in a file from which the index does not take them
        for file in self._files:
            for key, tensor in _map(file).items():
                if self._index.get(key, file.name) != file.name:
                    self._copies[key] = file
                    continue
                if key in self._file_of:
                    raise ValueError(in_two_files(key, self._file_of[key], file))
                self._tensors[key], self._file_of[key] = tensor, file

        config = read_json(self.config_file)
        foreign = foreign_keys(_names(self._files), [*self._tensors], config, self.config_file)
        if foreign:
            raise ValueError(foreign)
        read_args = self._args_from_hf if self.is_hf else self._args_from_meta
        self.has_heads = _number(config, "n_future_tokens", self.config_file, default=1) > 1
        self.args = read_args(config, n_future_tokens)
        self._check_widths()
        self._their_keys = self._name_keys(config)
        self._check_keys()
        check_vocab(folder, self.args["vocab_size"])

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a parameter, under our key, in the dtype of the file.

        The tensor lies in the mapped file, except for rows of q and k that must be reordered.
        """
        tensor = self._tensors[self._their_keys[key]]
        heads = rotary_heads(key, self.args) if self.is_hf else None
        if heads is None:
            return tensor[start:stop]
        head_dim = self.args["embed_dim"] // self.args["num_heads"]
        return tensor[rows_from_hf(heads, head_dim)[start:stop]]

    def _args_from_meta(self, config: dict, n_future_tokens: int | None) -> dict:
        file = self.config_file
        dim, num_heads = _number(config, "dim", file), _number(config, "n_heads", file)
        found = self._heads_of(config, n_future_tokens)
        hidden = self._shape("layers.0.feed_forward.w1.weight")[0]
        if "multiple_of" in config:
            multiplier = _number(config, "ffn_dim_multiplier", file, float, default=1.0)
            hidden = meta_hidden_dim(dim, _number(config, "multiple_of", file), multiplier)
        if config.get("vocab_size", -1) == -1:  # Llama-2's files say -1: the tokenizer's
            vocab_size = self._shape("tok_embeddings.weight")[0]
        else:
            vocab_size = _number(config, "vocab_size", file)
        num_layers = _number(config, "n_layers", file)
        if num_layers <= found:
            raise ValueError(
                f"{file}: n_layers is {num_layers} and n_future_tokens {found}: n_layers counts "
                "trunk and heads together and is the larger one"
            )
        return dict(
            vocab_size=vocab_size,
            num_layers=num_layers,
            n_future_tokens=found,
            num_heads=num_heads,
            num_kv_heads=_number(config, "n_kv_heads", file, default=num_heads),
            embed_dim=dim,
            max_seq_len=_number(config, "max_seq_len", file, default=META_CONTEXT),
            intermediate_dim=hidden,
            norm_eps=_number(config, "norm_eps", file, float, default=1e-5),
            rope_base=_number(config, "rope_theta", file, float, default=10_000.0),
            rope_scaling=self._scaling_of(
                config.get("rope_scaling")
                or (LLAMA3_SCALING if config.get("use_scaled_rope") else None)
            ),
        )

    def _heads_of(self, config: dict, n_future_tokens: int | None) -> int:
        found = _number(config, "n_future_tokens", self.config_file, default=1)
        if n_future_tokens not in (None, found):
            raise ValueError(
                f"{self.config_file}: n_future_tokens is {found}, the model has "
                f"{n_future_tokens}: set model.n_future_tokens to {found}"
            )
        return found

    def _scaling_of(self, block: Any) -> dict | None:
        try:
            return check_rope_scaling(block) if block else None
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self.config_file}: {error}") from error

    def _args_from_hf(self, config: dict, n_future_tokens: int | None) -> dict:
        file = self.config_file
        dim, num_heads = (
            _number(config, name, file) for name in ("hidden_size", "num_attention_heads")
        )
        # transformers 5 moved rope_theta and what was rope_scaling into rope_parameters.
        rope, scaling = (config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
        for name, block in {"rope_parameters": rope, "rope_scaling": scaling}.items():
            if not isinstance(block, dict):
                raise ValueError(f"{file}: {name} is {block!r}, not a JSON object")
        rope, scaling = config | rope, scaling or rope
        family, rope_type = config.get("model_type"), scaling.get("rope_type", scaling.get("type"))
        if family not in SAME_AS_LLAMA:
            raise ValueError(
                f"{file}: model_type is {family!r}, which needs "
                f"{needs_of(family)}: only a Llama ({', '.join(SAME_AS_LLAMA)}) is supported"
            )
        only = {
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "attention_bias": (config.get("attention_bias", False), False),
            "mlp_bias": (config.get("mlp_bias", False), False),
            "head_dim": (config.get("head_dim") or dim // num_heads, dim // num_heads),
            "sliding_window": (config.get("sliding_window"), None),
            "rope_type": (rope_type or "default", "default"),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1), 1),
        }
        if rope_type == "llama3":
            del only["rope_type"]
        for name, (value, supported) in only.items():
            if value != supported:
                needs = NEEDED_BY.get(name, "")
                raise ValueError(
                    f"{file}: {name} is {value!r}{needs}, but only a Llama with {supported!r} is "
                    "supported"
                )
        n_heads = n_future_tokens or 1
        if self.has_heads:
            n_heads = self._heads_of(config, n_future_tokens)
        num_layers = _number(config, "num_hidden_layers", file, at_least=2)  # trunk and head 0
        return dict(
            vocab_size=_number(config, "vocab_size", file),
            num_layers=num_layers + n_heads - 1,
            n_future_tokens=n_heads,
            num_heads=num_heads,
            num_kv_heads=_number(config, "num_key_value_heads", file, default=num_heads),
            embed_dim=dim,
            # transformers' default
            max_seq_len=_number(config, "max_position_embeddings", file, default=2048),
            intermediate_dim=_number(config, "intermediate_size", file),
            norm_eps=_number(config, "rms_norm_eps", file, float, default=1e-6),
            rope_base=_number(rope, "rope_theta", file, float, default=10_000.0),
            rope_scaling=self._scaling_of(scaling if rope_type == "llama3" else None),
        )

    def _check_widths(self) -> None:
        dim, heads, kv_heads = (self.args[n] for n in ("embed_dim", "num_heads", "num_kv_heads"))
        if dim % (2 * heads) or heads % kv_heads:
            raise ValueError(
                f"{self.config_file}: a width of {dim} does not divide into {heads} heads of an "
                f"even width, or these into {kv_heads} groups of keys and values"
            )

    def _name_keys(self, config: dict) -> dict[str, str]:
        name = partial(hf_key, all_heads=self.has_heads) if self.is_hf else meta_key
        n_trunk = self.args["num_layers"] - self.args["n_future_tokens"]
        if self.args["num_layers"] > len(self._tensors) + self.args["n_future_tokens"]:
            raise ValueError(
                f"{self.config_file}: {self.args['num_layers']} layers cannot be in "
                f"{_names(self._files)}, which holds {len(self._tensors)} tensors"
            )
        names = {key: name(key, n_trunk) for key in parameter_shapes(self.args)}
        if self.is_hf and config.get("tie_word_embeddings", False):
            self._tensors.pop(names["output.proj.weight"], None)
            names["output.proj.weight"] = names["tok_embeddings.weight"]
        return names

    def _check_keys(self) -> None:
        """Compare what the files hold with what the config asks for."""
        expected = {self._their_keys[k]: shape for k, shape in parameter_shapes(self.args).items()}
        missing = [self._missing(key) for key in expected if key not in self._tensors]
        problems = []
        for key, tensor in self._tensors.items():
            where, shape = f"key {key} in {self._file_of[key].name}", expected.get(key)
            if shape is None:
                if not KNOWN_BUFFERS.fullmatch(key):
                    problems.append(f"extra {where}")
            elif tensor.shape != shape:
                problems.append(f"{where} has shape {list(tensor.shape)}, not {list(shape)}")
            elif tensor.layout != torch.strided or tensor.dtype not in WEIGHT_DTYPES:
                problems.append(
                    f"{where} is a tensor of {tensor.dtype}, {tensor.layout}: weights are plain "
                    "floating-point numbers"
                )
            elif tensor.is_meta:
                problems.append(f"{where} was saved without its values")
        half = MAX_PROBLEMS // 2  # of many, what is there must be seen beside what is not
        problems = missing[:half] + problems[:half] + missing[half:] + problems[half:]
        _raise_all(problems, f"{_names(self._files)} does not hold what {self.config_file} says")

    def _missing(self, key: str) -> str:
        """A missing key; if the index names a file for it, that too."""
        if key not in self._index:
            return f"missing key {key}"
        where = f", but it is in {self._copies[key].name}" if key in self._copies else ""
        return f"missing key {key}, which the index places in {self._index[key]}{where}"

    def _shape(self, key: str) -> torch.Size:
        if key not in self._tensors:
            held = ", ".join([*self._tensors][:3]) or "nothing"
            raise ValueError(f"{_names(self._files)}: missing key {key}, it holds {held}, ...")
        return self._tensors[key].shape


def model_args_from_folder(
    folder: str | Path, *, max_seq_len: int, n_future_tokens: int | None = None
) -> dict:
    """Arguments of ``mtp_llama2`` for a folder's model that takes rows of ``max_seq_len``.

    Raises:
        ValueError: as ``Checkpoint`` does, or if the folder's context is shorter than that.
    """
    return args_of(folder, n_future_tokens, max_seq_len)


def args_of(
    folder: str | Path, n_future_tokens: int | None = None, max_seq_len: int | None = None
) -> dict:
    """As ``model_args_from_folder``; ``max_seq_len`` None is the folder's context."""
    args = Checkpoint(folder, n_future_tokens).args
    max_seq_len = args["max_seq_len"] if max_seq_len is None else max_seq_len
    if args["max_seq_len"] < max_seq_len:
        raise ValueError(
            f"{folder} was trained on rows of {args['max_seq_len']} tokens, this run has rows of "
            f"{max_seq_len}: lower tokenizer.max_seq_len or take another checkpoint"
        )
    return args | {"max_seq_len": max_seq_len}


def check_model(
    model_args: dict, tokenizer_path: str | Path, max_seq_len: int, folder: str | Path | None = None
) -> None:
    """Compare a model with its tokenizer, and its checkpoint folder, before any data is made.

    ``max_seq_len`` is the longest row in tokens; without a folder the model starts from nothing.

    Raises:
        ValueError: as ``check_folder`` and ``check_vocab`` do, or if the rows are too long.
    """
    if folder is None:
        check_vocab(tokenizer_path, model_args["vocab_size"])
    else:
        check_folder(folder, model_args, tokenizer_path)
    if model_args["max_seq_len"] < max_seq_len:
        raise ValueError(
            f"tokenizer.max_seq_len {max_seq_len} exceeds model.max_seq_len "
            f"{model_args['max_seq_len']}: raise the model's or lower the tokenizer's"
        )


def check_folder(folder: str | Path, model_args: dict, tokenizer_path: str | Path) -> None:
    """Raise what ``load_into`` would, before a model or any data is made.

    Raises:
        ValueError: as ``Checkpoint`` does, or if ``model.args`` are not the folder's, or the
            tokenizer of the token ids has other pieces than the folder's.
    """
    checkpoint = Checkpoint(folder, model_args["n_future_tokens"])
    _check_args(checkpoint, model_args)
    check_same_vocabulary(tokenizer_path, checkpoint.tokenizer_path)


def check_vocab(folder: str | Path, vocab_size: int) -> None:
    """ValueError unless a tokenizer, or a folder's, has as many pieces as an embedding rows."""
    path = Path(folder)
    path = path / "tokenizer.model" if path.is_dir() else path
    pieces = _pieces(path)
    more = vocab_size - len(pieces)
    if more:
        way_out = (
            "use the tokenizer that the model was trained with, or give a new one as many rows"
        )
        if 0 < more <= FEW_TOKENS:
            added = ", ".join(map(repr, added_tokens(path.parent, len(pieces))[:MAX_PROBLEMS]))
            way_out = (
                f"if the tokenizer is the model's own, tokens were added beside it, or rows as "
                f"padding{f' (added: {added})' if added else ''}: cut the embedding and output to "
                f"{len(pieces)} rows (transformers: model.resize_token_embeddings({len(pieces)})) "
                "and save again"
            )
        elif -FEW_TOKENS <= more < 0:
            way_out = (
                f"if the model is the tokenizer's own, pieces were added ({_shown(pieces[more:])} "
                f"come last): take the tokenizer from before, or give the model {len(pieces)} rows "
                f"(transformers: model.resize_token_embeddings({len(pieces)})) and save again"
            )
        raise ValueError(
            f"{path} has {len(pieces)} pieces but tok_embeddings has {vocab_size} rows: {way_out}"
        )


def check_same_vocabulary(path_a: str | Path, path_b: str | Path) -> None:
    """ValueError unless two SentencePiece models give every id the same meaning."""
    pieces_a, pieces_b = _pieces(Path(path_a)), _pieces(Path(path_b))
    common = min(len(pieces_a), len(pieces_b))
    extra = pieces_a[common:] or pieces_b[common:]
    changed = sum(a != b for a, b in zip(pieces_a, pieces_b, strict=False))
    if extra and not changed:
        longer, other = (path_a, path_b) if pieces_a[common:] else (path_b, path_a)
        raise ValueError(
            f"the vocabularies of {path_a} and {path_b} differ in {len(extra)} pieces: {longer} "
            f"has {_shown(extra)} after the {common} that both have: use {other} for both"
        )
    if changed:
        raise ValueError(
            f"the vocabularies of {path_a} and {path_b} differ in {changed + len(extra)} pieces: "
            "their token ids mean different things: use the tokenizer that the model was trained "
            "with"
        )


def _shown(pieces: list[str]) -> str:
    return ", ".join(map(repr, pieces[:3])) + (", ..." if len(pieces) > 3 else "")


def load_into(model: MTPTransformer, folder: str | Path, *, device: torch.device | str) -> None:
    """Fill a built model, plain or sharded by FSDP2 along dimension 0, from a checkpoint folder.

    A parameter keeps its dtype; values are converted row block by row block while they are copied.
    A model on the meta device gets its memory on ``device`` first, and the RoPE tables are computed
    there. The model's ``context`` becomes the folder's if that is longer, so that training on short
    rows does not shorten what an export says.

    Raises:
        ValueError: as ``check_folder`` does.
    """
    checkpoint = Checkpoint(folder, model.n_future_tokens)
    _check_args(checkpoint, model.args)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    with torch.no_grad():
        for key, parameter in model.state_dict(keep_vars=True).items():
            if is_adapter(key):  # no checkpoint has them: see ``init_adapters_``
                continue
            if isinstance(parameter, NF4Tensor):  # made anew: what to_empty gives lacks its tables
                weight = to_nf4(checkpoint.read(key).to(device, parameter.dtype))
                swap_tensors(parameter, nn.Parameter(weight, requires_grad=False))
                continue
            rows, start = local_rows(parameter)
            rows.copy_(checkpoint.read(key, start, start + len(rows)))
        for module in model.modules():
            if isinstance(module, RotaryPositionalEmbeddings):
                with torch.device(device):
                    module.rope_init()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.context = max(model.context, checkpoint.args["max_seq_len"])


def _check_args(checkpoint: Checkpoint, model_args: dict) -> None:
    problems = [
        f"{name} is {checkpoint.args[name]} in the checkpoint and {model_args[name]} in the model"
        for name in checkpoint.args
        if name != "max_seq_len" and checkpoint.args[name] != model_args[name]
    ]
    _raise_all(problems, f"{checkpoint.config_file} describes another model")


def _raise_all(problems: list[str], headline: str) -> None:
    if problems:
        hidden = len(problems) - MAX_PROBLEMS
        shown = problems[:MAX_PROBLEMS] + ([f"and {hidden} more"] if hidden > 0 else [])
        raise ValueError("\n  ".join([f"{headline}:", *shown]))


def _names(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} weight files)"


def _pieces(path: Path) -> list[str]:
    """Pieces of a SentencePiece model by id; ValueError if the file is none, and what it is."""
    fault = tokenizer_fault(path)
    if fault:
        raise ValueError(f"{path} {fault}")
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=str(path))
        return tokenizer.id_to_piece(list(range(tokenizer.get_piece_size())))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: a piece of it is not text, copy it again") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model, or is damaged ({error}): copy it again"
        ) from error


def _number(
    config: dict,
    name: str,
    file: Path,
    kind: type = int,
    *,
    at_least: int = 1,
    default: float | None = None,
) -> Any:
    """A field that must be a whole number up to ``MOST``, or with ``kind`` float any above 0.

    With a default the field may be left out or null.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if name not in config:
        raise ValueError(f"{file} has no {name!r}")
    fits = type(value) is int or (kind is float and type(value) is float)
    if not fits or not (at_least <= value <= MOST if kind is int else 0 < value <= MOST):
        must = f"a whole number, at least {at_least}" if kind is int else "a number above 0"
        raise ValueError(f"{file}: {name} must be {must}, got {json.dumps(value)[:99]}")
    return value


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's format.

    Mistral's hold two formats: its own has a params.json too, which names the hidden_dim that
    Meta's does not, and weights that are read here under Hugging Face's names.
    """
    params = folder / "params.json"
    if not params.exists():
        return False
    is_mistrals = params.is_file() and b'"hidden_dim"' in params.read_bytes()[:4096]
    return not (is_mistrals and (folder / "config.json").exists())


def _consolidated_files(folder: Path) -> list[Path]:
    whole = folder / "consolidated.pth"
    parts = sorted(folder.glob("consolidated.*.pth"))
    if whole.exists() or whole.is_symlink():
        return [whole, *parts]  # no key may be in two of them
    if not parts:
        hint = which_weights(weight_files(folder))
        if (folder / "config.json").exists():
            hint += "; to read it as a Hugging Face folder, take params.json out"
        raise ValueError(f"{whole} is missing beside params.json{hint}")
    if len(parts) > 1:
        raise ValueError(
            f"{folder} holds {len(parts)} model-parallel parts ({parts[0].name}, ...): take the "
            "Hugging Face version of this checkpoint, which is not cut through tensors"
        )
    return parts


def _hf_weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Weight files of a Hugging Face folder, and the file of each key if an index says so.

    Torch files are read where safetensors are absent. An index decides; one whose shards are gone
    is left over from an earlier state if the weights are there in one file.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        is_whole = whole.exists() or whole.is_symlink()
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no 'weight_map' from keys to files")
            for shard in weight_map.values():
                # A plain name: "../other/x" or "/x" would read a file that is no part of this.
                is_name = isinstance(shard, str) and shard == Path(shard).name
                if not is_name or shard in ("", "..") or "\0" in shard:
                    raise ValueError(
                        f"{index} names the shard {str(shard)[:99]!r}, which is not a file "
                        "in its folder: download the index again, or correct it"
                    )
            shards = [folder / shard for shard in sorted(set(weight_map.values()))]
            missing = [shard for shard in shards if not shard.exists()]
            if not missing:
                return shards, weight_map
            if not is_whole:
                named = ", ".join(shard.name for shard in missing)
                dead = next((shard for shard in missing if shard.is_symlink()), None)
                hint = f" ({dead.name} is {stand_in(dead)})" if dead else ": download them"
                raise ValueError(f"{index} names shards that are missing: {named}{hint}")
        if is_whole:
            return [whole], {}
    raise ValueError(_no_hf_weights(folder))


def _no_hf_weights(folder: Path) -> str:
    """Why a folder with config.json has no weights that can be read."""
    there = weight_files(folder)
    for suffix, index in {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}.items():
        shards = [f for f in there if f.suffix == suffix and not f.name.startswith("adapter_model")]
        if len(shards) > 1 or any("-of-" in shard.name for shard in shards):
            file_of: dict[str, Path] = {}
            twice = ""
            for shard in shards:
                for key in _map(shard):
                    if key in file_of and not twice:
                        twice = f"; {in_two_files(key, file_of[key], shard)}"
                    file_of[key] = shard
            return (
                f"{folder / index}.index.json is missing, which says what is in {len(shards)} "
                f"shards ({', '.join(shard.name for shard in shards[:MAX_PROBLEMS])}): download "
                f"it from where they come from{twice}"
            )
    adapters = [file.name for file in there if file.name.startswith("adapter_model")]
    if adapters:
        return f"{folder}: {ADAPTER_ONLY.format(adapters[0])}"
    return f"{folder / 'model.safetensors'} is missing beside config.json{which_weights(there)}" + (
        ": a single file of weights must have that name" if len(there) == 1 else ""
    )


def _map(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a weight file; their bytes stay in the file until they are read."""
    found = stand_in(file)
    if found:
        raise ValueError(f"{file} is {found}")
    return _map_safetensors(file) if file.suffix == ".safetensors" else _map_torch(file)


def _map_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if _head(file).startswith(b"PK\3\4"):
            raise ValueError(
                f"{file} is a torch file under another name: rename it to pytorch_model.bin"
            ) from error
        raise ValueError(
            f"{file} is truncated or damaged, download or copy it again: {error}"
        ) from error


def _map_torch(file: Path) -> dict[str, torch.Tensor]:
    head = _head(file)
    if head[:2] == b"\x80\x02":
        raise ValueError(
            f"{file} is in torch's format from before 1.6, which cannot be memory-mapped: load it "
            "and torch.save it again"
        )
    if head[8:10] == b'{"':
        raise ValueError(
            f"{file} is a safetensors file under another name: rename it to model.safetensors, "
            "beside a config.json"
        )
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} carries Python code or objects beside its tensors, or is damaged, and was not "
            "opened: save a plain dictionary of tensors, or copy it again"
        ) from error
    except Exception as error:  # of a pickle with flipped bits, there is no telling which
        raise ValueError(f"{file} is truncated or damaged, download or copy it again") from error
    is_state = isinstance(state, dict) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()
    )
    if not is_state:
        held = ", ".join(map(repr, list(state)[:MAX_PROBLEMS])) if isinstance(state, dict) else ""
        raise ValueError(
            f"{file} does not hold a dictionary of tensors but "
            + (f"one of {held}" if held else f"a {type(state).__name__}")
            + ": save the model's state_dict alone"
        )
    return state


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(16)


def meta_hidden_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    """Width of the feed-forward layer by the rule of Meta's Llama code: 2/3 of 4 D, rounded up."""
    hidden = int(multiplier * int(2 * 4 * dim / 3))
    return -(-hidden // multiple_of) * multiple_of
