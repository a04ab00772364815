"""``tokenizer.json`` and its config from a SentencePiece model, for transformers and vLLM.

transformers 5 can read ``tokenizer.model`` itself, but its Llama class then adds no dummy prefix
to a text that begins with a space, which SentencePiece does; such a prompt gets other ids than in
training. What is written here is what SentencePiece does, for older and newer versions.
"""

import json
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from wmtp_modules.checkpoints.refusals import tokenizer_fault

# ModelProto.SentencePiece.Type and TrainerSpec.ModelType of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2
_SPACE = "\u2581"


def write_hf_tokenizer(tokenizer_path: str | Path, folder: Path, *, max_seq_len: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a SentencePiece BPE model.

    ``max_seq_len`` is the longest input in tokens, for the config.

    Raises:
        ValueError: if the file is damaged, the model is not BPE or lacks bos, eos or unk, or it
            rewrites text before it is encoded.
    """
    fault = tokenizer_fault(Path(tokenizer_path))
    if fault:
        raise ValueError(f"{tokenizer_path} {fault}")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(tokenizer_path).read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{tokenizer_path} is not a SentencePiece model, or is damaged: copy it again"
        ) from error
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"{tokenizer_path} is not a BPE model, as Llama's tokenizers are")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ValueError(
            f"{tokenizer_path} normalises text before encoding, which this export cannot express: "
            "train it with normalization_rule_name=identity and remove_extra_whitespaces=false"
        )
    pieces = proto.pieces
    special = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    for name, i in special.items():
        if not 0 <= i < len(pieces):
            raise ValueError(
                f"{tokenizer_path} has no {name} piece (its id is {i} of {len(pieces)}): take a "
                "tokenizer with bos, eos and unk, as Llama's have"
            )
    bos, eos, unk = (pieces[i].piece for i in special.values())
    steps: list[dict] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, "special": piece.type != _USER_DEFINED}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, piece in enumerate(pieces)
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), _sequence("A", 0)],
            "pair": [_special(bos), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {
                bos: {"id": bos, "ids": [proto.trainer_spec.bos_id], "tokens": [bos]}
            },
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }
    config = {
        # The generic class takes tokenizer.json as it is; the Llama class rebuilds it its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # By default transformers 4 adds token_type_ids, which a Llama's generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


def _special(token: str, type_id: int = 0) -> dict:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _merges(pieces) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best first.

    SentencePiece joins the neighbours whose union has the highest score; a merge list is ranked.
    """
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):  # stable: ties by id
        if piece.type in (_NORMAL, _USER_DEFINED):  # byte pieces stand for bytes, not their text
            text = piece.piece
            splits = [(text[:i], text[i:]) for i in range(1, len(text))]
            known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
            merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return [list(pair) for pair in merges]
