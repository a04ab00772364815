"""Measures each head on held-out text: loss, accuracy and calibration.

Shapes: N targets, K heads, C token classes, S sums, M calibration bins, V vocabulary.

Each text becomes BOS + tokens + EOS, one document; of a prompt with its response only the response
is measured. What is longer than the context is split into consecutive documents, nothing is dropped
or truncated. Head k (0-based) at position t predicts token t + k + 1 of its document.
"""

import io
import keyword
import tokenize as python_tokenize
from collections.abc import Mapping, Sequence
from contextlib import suppress
from token import EXACT_TOKEN_TYPES
from typing import NamedTuple

import numpy as np
import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.data.forms import Reader, Sample
from wmtp_modules.data.packing import pad_rows
from wmtp_modules.data.sources import BadRow, fields_of, open_sources
from wmtp_modules.data.tokenize import encode_with_offsets
from wmtp_modules.loss.linear_cross_entropy import CHUNK_LOGITS_CPU, CHUNK_LOGITS_CUDA
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.progress import progress_bar

# Classes of a target token: Python's token types, with names split into keywords and identifiers.
TOKEN_CLASSES = (
    "keyword",
    "identifier",
    "number",
    "string",
    "operator",
    "comment",
    "layout",  # whitespace between Python's tokens, including line ends and indentation
    "other",  # not a Python token, such as the backslash that joins two lines
    "unparsed",  # from the point where the text is not Python
    "eos",
)
CLASS = {name: i for i, name in enumerate(TOKEN_CLASSES)}
CLASS_OF_TYPE = {
    "NUMBER": "number",
    "STRING": "string",
    "FSTRING_START": "string",  # Python 3.12 splits f-strings
    "FSTRING_MIDDLE": "string",
    "FSTRING_END": "string",
    "OP": "operator",
    "COMMENT": "comment",
}
SUMS = ("tokens", "loss", "top1", "top5")
TOP = 5
BINS = 15  # of equal width, as in Guo et al. 2017 (arXiv 1706.04599)


class HeldoutSums(NamedTuple):
    """Sums over targets, fp64; the sums of several shards can be added field by field."""

    tokens: torch.Tensor  # scalar: all tokens, including BOS and EOS
    classes_KCS: torch.Tensor  # SUMS of the targets of each head and class
    bins_KMS: torch.Tensor  # targets, confidence, top-1 hits of each head and confidence bin
    kept_K: torch.Tensor  # positions with a target for all heads, and those where heads 1..k agree

    def result(self) -> dict:
        """Means over all targets, None over nothing; ValueError if a loss is not finite.

        Returns:
            ``tokens``; ``per_head``: for each head ``head``, ``tokens`` (its targets), ``loss``
            (nats), ``top1``, ``top5`` (share of targets among the 1 and 5 most likely), ``ece`` and
            ``calibration``, the non-empty bins (see ``_calibration``); ``acceptance_length``: 1 +
            the mean number of consecutive heads 1, 2, ... whose most likely token is the one that
            head 0 finds most likely once it gets there, over all positions (a decoder skips those
            within blocks that it keeps, so it keeps fewer: ``run/acceptance.py``);
            ``by_token_class``: for each class among head 0's targets ``class``, its ``share`` of
            them, and for each head ``tokens``, ``loss`` and ``top1``.
        """
        heads_KS = self.classes_KCS.sum(1)
        if not heads_KS.isfinite().all():
            raise ValueError(
                "a held-out loss is not finite: check the checkpoint, tokenizer and dtype"
            )
        per_head = []
        for k, (sums_S, bins_MS) in enumerate(zip(heads_KS, self.bins_KMS, strict=True)):
            means = dict(zip(SUMS, _means(sums_S), strict=True))
            ece, calibration = _calibration(bins_MS)
            per_head.append({"head": k, **means, "ece": ece, "calibration": calibration})
        by_class = []
        for name, sums_KS in zip(TOKEN_CLASSES, self.classes_KCS.transpose(0, 1), strict=True):
            if sums_KS[0, 0] == 0:
                continue
            tokens, loss, top1, _ = map(list, zip(*map(_means, sums_KS), strict=True))
            row = {"class": name, "share": float(sums_KS[0, 0] / heads_KS[0, 0])}
            by_class.append(row | {"tokens": tokens, "loss": loss, "top1": top1})
        length = float(self.kept_K.sum() / self.kept_K[0]) if self.kept_K[0] else None
        return {
            "tokens": int(self.tokens),
            "per_head": per_head,
            "acceptance_length": length,
            "by_token_class": by_class,
        }


class _Document(NamedTuple):
    tokens: np.ndarray  # int64, at most the context long
    classes: np.ndarray  # int64, class of each token
    keep: np.ndarray  # int64, 1 where the token is measured


def read_rows(
    source: str | Sequence[str], columns: Mapping[str, str] | None = None
) -> list[str | Sample]:
    """Held-out rows of any form that training reads: texts, empty ones too, or prompts with
    responses, of which the responses are measured.

    Args: see ``rows_dataset``. Of a folder its validation split is read, or else what has none.

    Raises:
        ValueError: if the source is missing or empty, or a row cannot be used.
    """
    reader, rows = Reader(columns), []
    for opened in open_sources(source, "validation", reader.columns, cells=reader.cells):
        for _, records in opened.parts():
            for where, record in records:
                try:
                    if isinstance(record, BadRow):
                        raise record
                    text = record.get(reader.columns[0])
                    if isinstance(text, str) and not text.strip():
                        rows.append(text)
                        continue
                    sample = reader(record)[0]
                except BadRow as error:
                    place = opened.root / where if opened.hub is None else where
                    raise ValueError(
                        f"{place}: {error}{fields_of(record)}. Held-out rows are never skipped: "
                        "fix or delete it"
                    ) from error
                rows.append(sample.response if sample.prompt is None else sample)
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def read_texts(source: str | Sequence[str]) -> list[str]:
    """The texts of ``read_rows``, prompts and responses as one."""
    rows = read_rows(source)
    return [row if isinstance(row, str) else "".join(map("".join, row.turns)) for row in rows]


@torch.inference_mode()
def heldout_sums(
    model: MTPTransformer,
    tokenizer: Llama2Tokenizer,
    texts: Sequence[str | Sample],
    *,
    device: torch.device | str,
    batch_tokens: int,
    show_progress: bool = False,
) -> HeldoutSums:
    """Run a model over texts and compute the sums that ``HeldoutSums.result`` divides.

    Documents of a batch are padded on the right, where causal attention cannot see, and padding
    is not a target: batching only changes the rounding. Logits are computed for one head and one
    chunk of targets at a time, and only sums are kept.

    Args:
        model: on ``device``, not sharded, without KV caches.
        tokenizer: texts are split at its ``max_seq_len`` or the model's, whichever is smaller.
        texts: of this rank, from ``read_rows``; an empty list gives sums of zero.
        batch_tokens: tokens of a batch, including padding; a longer document is its own batch.
    """
    K = model.n_future_tokens
    zeros = {"dtype": torch.float64, "device": device}
    classes_KCS = torch.zeros(K, len(TOKEN_CLASSES), len(SUMS), **zeros)
    bins_KMS = torch.zeros(K, BINS, 3, **zeros)
    kept_K = torch.zeros(K, **zeros)
    context = min(tokenizer.max_seq_len or model.max_seq_len, model.max_seq_len)
    documents = [document for text in texts for document in _documents(tokenizer, text, context)]
    n_tokens = sum(len(document.tokens) for document in documents)
    documents.sort(key=lambda document: len(document.tokens), reverse=True)

    with progress_bar(
        total=n_tokens, desc="held-out tokens", unit="tok", shown=show_progress
    ) as progress:
        while documents:
            n_rows = max(1, batch_tokens // len(documents[0].tokens))
            batch, documents = documents[:n_rows], documents[n_rows:]
            tokens_BT, doc_BT = (x.to(device) for x in pad_rows([row.tokens for row in batch]))
            classes_BT = pad_rows([row.classes for row in batch])[0].to(device)
            keep_BT = pad_rows([row.keep for row in batch])[0].to(device) > 0
            hidden_BTD = model.trunk(tokens_BT)
            choices_KBT = []
            for k, head in enumerate(model.heads):
                is_target_BT = ((doc_BT >= 0) & keep_BT)[:, k + 1 :]
                head_BTD = head(hidden_BTD)[:, : is_target_BT.shape[1]]
                choices_BT = torch.full_like(is_target_BT, -1, dtype=torch.int64)
                choices_BT[is_target_BT] = _add_targets(
                    model,
                    head_BTD[is_target_BT],
                    tokens_BT[:, k + 1 :][is_target_BT],
                    classes_BT[:, k + 1 :][is_target_BT],
                    classes_KCS[k],
                    bins_KMS[k],
                )
                choices_KBT.append(choices_BT)
            kept_K += _kept(choices_KBT)
            progress.update(sum(len(row.tokens) for row in batch))
    return HeldoutSums(torch.tensor(n_tokens, **zeros), classes_KCS, bins_KMS, kept_K)


def _documents(tokenizer: Llama2Tokenizer, row: str | Sample, context: int) -> list[_Document]:
    columns: list[list[int]] = [[], [], []]
    for prompt, response in [("", row)] if isinstance(row, str) else row.turns:
        text = prompt + response
        ids, spans = encode_with_offsets(tokenizer, text)
        classes = [CLASS["other"], *token_classes(text, spans), CLASS["eos"]]
        # BOS is no target of a text, where it comes first, and not what a prompt asks for.
        keep = [0, *(int(not prompt or end > len(prompt)) for _, end in spans), 1]
        tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        columns = [a + b for a, b in zip(columns, (tokens, classes, keep), strict=True)]
    arrays = [np.array(column, np.int64) for column in columns]
    return [
        _Document(*(array[cut : cut + context] for array in arrays))
        for cut in range(0, len(arrays[0]), context)
    ]


def _add_targets(
    model: MTPTransformer,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    classes_N: torch.Tensor,
    classes_CS: torch.Tensor,
    bins_MS: torch.Tensor,
) -> torch.Tensor:
    """Add targets of one head to its sums; returns the most likely token of each.

    A target's rank counts the logits above its own, and equal ones of lower id. Rank 0 is what
    greedy decoding picks, and ties are treated the same everywhere.
    """
    proj = model.output.proj
    V, device = proj.out_features, hidden_ND.device
    chunk = max(1, (CHUNK_LOGITS_CUDA if device.type == "cuda" else CHUNK_LOGITS_CPU) // V)
    ids_V = torch.arange(V, device=device)
    choices = [labels_N[:0]]
    for hidden, labels, classes in zip(
        *(x.split(chunk) for x in (hidden_ND, labels_N, classes_N)), strict=True
    ):
        logits_NV = proj(model.output.norm(hidden))
        lse_N = logits_NV.logsumexp(-1)
        own_N1 = logits_NV.gather(1, labels[:, None])
        ahead_NV = (logits_NV > own_N1) | ((logits_NV == own_N1) & (ids_V < labels[:, None]))
        rank_N = ahead_NV.sum(-1)
        loss_N = lse_N - own_N1.squeeze(1)
        likeliest_N, choice_N = logits_NV.max(-1)
        confidence_N = (likeliest_N - lse_N).exp()
        choices.append(choice_N)
        top1_N, top5_N = rank_N < 1, rank_N < TOP
        one_N = torch.ones_like(loss_N)
        sums_NS = torch.stack([one_N, loss_N, top1_N, top5_N], dim=1).double()
        classes_CS.index_add_(0, classes, sums_NS)
        bin_N = ((confidence_N * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # (low, high]
        bins_MS.index_add_(0, bin_N, torch.stack([one_N, confidence_N, top1_N], dim=1).double())
    return torch.cat(choices)


def _kept(choices_KBT: list[torch.Tensor]) -> torch.Tensor:
    """How often consecutive heads chose what head 0 chose k positions later.

    ``choices_KBT`` has each head's choice, [B, T - 1 - k], -1 where there is no target. Of the
    positions where all heads have one: their number, then of those where heads 1..k agree.
    """
    n = choices_KBT[-1].shape[1]
    kept_BT = torch.stack([choices_BT[:, :n] >= 0 for choices_BT in choices_KBT]).all(0)
    kept = [kept_BT.sum()]
    for k, choices_BT in enumerate(choices_KBT[1:], start=1):
        kept_BT = kept_BT & (choices_BT[:, :n] == choices_KBT[0][:, k : n + k])
        kept.append(kept_BT.sum())
    return torch.stack(kept)


def token_classes(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Index into ``TOKEN_CLASSES`` of each token: that of its first non-whitespace character.

    A token of only whitespace has the class of its first character, which is ``layout`` except in
    strings, comments and text that is not Python. A token without characters (the space that
    Llama-2's tokenizer puts before a text) is ``layout``. ``spans`` are [begin, end) in characters.
    """
    classes = _character_classes(text)
    token_classes = []
    for begin, end in spans:
        first = next((at for at in range(begin, end) if not text[at].isspace()), begin)
        token_classes.append(classes[first] if begin < end else CLASS["layout"])
    return token_classes


def _character_classes(text: str) -> bytearray:
    """Class of each character, by Python's own tokenizer."""
    layout, other = CLASS["layout"], CLASS["other"]
    classes = bytearray(layout if character.isspace() else other for character in text)
    # As the tokenizer reads lines: only a newline ends one; a carriage return does not.
    lines = io.StringIO(text, newline="\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))]).tolist()
    parsed = 0  # end of the last Python token, in characters
    with suppress(python_tokenize.TokenError, SyntaxError):  # not Python from there on
        for token in python_tokenize.generate_tokens(lines.readline):
            # Python 3.12 calls characters that are not Python, such as "?", operators.
            is_operator = token.type == python_tokenize.OP
            if token.type == python_tokenize.ERRORTOKEN or (
                is_operator and token.string not in EXACT_TOKEN_TYPES
            ):
                break
            begin, end = (min(starts[row - 1] + column, len(text)) for row, column in token[2:4])
            if token.type == python_tokenize.NAME:
                name = "keyword" if keyword.iskeyword(token.string) else "identifier"
            else:
                name = CLASS_OF_TYPE.get(python_tokenize.tok_name[token.type])
            if name is not None:
                classes[begin:end] = bytes([CLASS[name]]) * (end - begin)
            parsed = end
        else:
            return classes
    rest = len(text) - len(text[parsed:].lstrip())
    classes[rest:] = bytes([CLASS["unparsed"]]) * (len(text) - rest)
    return classes


def _means(sums_S: torch.Tensor) -> tuple[int, float | None, float | None, float | None]:
    """Number of targets, and the means of the other ``SUMS``."""
    n, *sums = sums_S.tolist()
    first, second, third = (x / n if n else None for x in sums)
    return int(n), first, second, third


def _calibration(bins_MS: torch.Tensor) -> tuple[float | None, list[dict]]:
    """Expected calibration error and the bins that are not empty.

    The error is the mean over targets of |accuracy - confidence| of the target's bin (Guo et al.
    2017, eq. 3), where confidence is the probability of the likeliest token, in (low, high].
    """
    n_targets, error, bins = float(bins_MS[:, 0].sum()), 0.0, []
    for m, (n, confidence, hits) in enumerate(bins_MS.tolist()):
        if n:
            error += abs(hits - confidence)
            row = {"low": m / BINS, "high": (m + 1) / BINS, "tokens": int(n)}
            bins.append(row | {"confidence": confidence / n, "accuracy": hits / n})
    return (error / n_targets if n_targets else None), bins
