"""The tokens that a run trained on last, each with its weight and losses: a file, and its HTML.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1.
"""

import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wmtp_modules.files import new_file
from wmtp_modules.reports.page import paragraph
from wmtp_modules.reports.weights_page import FULL, legend, token_texts

if TYPE_CHECKING:  # a page is made without them
    import torch
    from torchtune.models.llama2 import Llama2Tokenizer

MOST_TOKENS = 2048  # in a file, so that a page opens at once
LEVELS = 7  # of a colour, below and above a weight of 1


def write_tokens(
    path: Path,
    tokenizer: "Llama2Tokenizer",
    *,
    step: int,
    batch: Mapping[str, "torch.Tensor"],
    mask_BTK: "torch.Tensor",
    of_heads: Mapping[str, "torch.Tensor"],
    of_tokens: Mapping[str, "torch.Tensor"] = MappingProxyType({}),
) -> None:
    """Write ``tokens.json``: a micro-batch of this rank, whole rows as far as they fit.

    Args:
        step: optimizer steps that were done with it.
        batch: packed ``tokens``, ``doc``, ``row`` and ``noise``, [B, T].
        mask_BTK: bool, True where a head has a target.
        of_heads: by name, such as weight and loss, at the position that predicts, [B, T, K].
        of_tokens: by name, such as a critic's value, [B, T].
    """
    documents, taken, left_out = [], 0, 0
    for b, places in _documents(batch["doc"].cpu()):
        if taken >= MOST_TOKENS:
            left_out += len(places)
            continue
        left_out += max(0, taken + len(places) - MOST_TOKENS)
        places = places[: MOST_TOKENS - taken]
        taken += len(places)
        heads: list[list] = [[] for _ in places]
        for k in range(mask_BTK.shape[-1]):
            for i, u in enumerate(places):
                t = u - k - 1
                is_target = i > k and bool(mask_BTK[b, t, k])
                values = [_plain(x[b, t, k]) for x in of_heads.values()] if is_target else None
                heads[i].append(values)
        first, end = places[0], places[-1] + 1
        documents.append(
            {
                "row": int(batch["row"][b, first]),
                "tokens": token_texts(tokenizer, batch["tokens"][b, first:end].tolist()),
                "marked": batch["noise"][b, first:end].tolist(),
                "heads": heads,
                **{name: [_plain(v) for v in x[b, first:end]] for name, x in of_tokens.items()},
            }
        )
    record = {
        "step": step,
        "of_heads": [*of_heads],
        "of_tokens": [*of_tokens],
        "left_out": left_out,
        "documents": documents,
    }
    with new_file(path) as unfinished:
        unfinished.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")


def _documents(doc_BT: "torch.Tensor") -> Iterator[tuple[int, list[int]]]:
    """(pack, its positions) of each document of a micro-batch, padding left out."""
    for b, docs in enumerate(doc_BT.tolist()):
        places: dict[int, list[int]] = {}
        for t, doc in enumerate(docs):
            if doc >= 0:
                places.setdefault(doc, []).append(t)
        yield from ((b, one) for one in places.values())


def _plain(value: "torch.Tensor") -> float | None:
    """Five significant digits; None if it is not finite, which JSON does not have."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


def tokens_html(record: Mapping[str, Any]) -> str:
    """What ``write_tokens`` wrote, coloured by the weight of the head that is chosen; no script.

    Hovering shows a token with all its figures. Empty if no document is there.
    """
    documents = record["documents"]
    if not documents:
        return ""
    K = len(documents[0]["heads"][0])
    rules = [
        f"--u{i}:rgb(var(--above)/{i / 10});--d{i}:rgb(var(--below)/{i / 10})" for i in _LEVELS
    ]
    style = [f":root{{{';'.join(rules)}}}"]
    chosen = []
    for k in range(K):
        style.append(f"#head{k}:checked~.code span{{background:var(--h{k});color:var(--t{k})}}")
        checked = " checked" if k == 0 else ""
        chosen.append(f"<input type=radio name=head id=head{k}{checked}>")
        chosen.append(f"<label for=head{k}>head {k}</label>")
    texts = []
    for document in documents:
        spans = "".join(_spans(document, record))
        texts.append(
            f"<p class='note'>row {document['row']}</p>\n<div class='code'>{spans}</div>\n"
        )
    more = f" {record['left_out']:,} more tokens are not shown." if record["left_out"] else ""
    return (
        f"<style>{''.join(style)}</style>\n"
        + paragraph(
            f"What rank 0 trained on in step {record['step']:,}, with the losses before that "
            "update and the weights that it used. The colour is the weight with which the chosen "
            "head k learns to predict the token, k + 1 positions before it; hover for all "
            f"figures.{more}",
            "caption",
        )
        + f"{legend()}<div class='heads'>\n{''.join(chosen)}\n{''.join(texts)}</div>\n"
    )


_LEVELS = range(1, LEVELS + 1)


def _spans(document: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    names, tokens = record["of_heads"], document["tokens"]
    for i, (token, heads) in enumerate(zip(tokens, document["heads"], strict=True)):
        style, told = [], [f"token {i}: {token!r}"]
        for k, values in enumerate(heads):
            if values is None:
                style.append(f"--t{k}:var(--grey)")
                told.append(f"head {k}: not supervised")
                continue
            pairs = zip(names, values, strict=True)
            told.append(f"head {k}: " + ", ".join(f"{name} {_told(v)}" for name, v in pairs))
            if colour := _level(values[0]):
                style.append(f"--h{k}:var({colour})")
        told += [f"{name} {_told(document[name][i])}" for name in record["of_tokens"]]
        kinds = [{"": "empty", "\n": "newline"}.get(token, ""), "marked" * document["marked"][i]]
        attributes = {
            "class": " ".join(filter(None, kinds)),
            "style": ";".join(style),
            "title": "\n".join(told),
        }
        shown = "".join(f' {key}="{_text(x)}"' for key, x in attributes.items() if x)
        yield f"<span{shown}>{_text(token)}</span>"


def _text(text: str) -> str:
    """Escaped; HTML would read a carriage return as a line feed."""
    return escape(text).replace("\r", "&#13;")


def _told(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _level(weight: float | None) -> str | None:
    """The colour of a weight, from 1/4 to 4 on a logarithmic scale; None for about 1."""
    if weight is None:
        return None
    distance = min(abs(math.log(max(weight, 1 / FULL)) / math.log(FULL)), 1)
    level = round(LEVELS * distance)
    return f"--{'u' if weight > 1 else 'd'}{level}" if level else None
