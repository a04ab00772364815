"""Writes a page of texts with every token coloured by its weight."""

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_modules.reports.page import paragraph, write_page

if TYPE_CHECKING:  # a page is made without it
    from torchtune.models.llama2 import Llama2Tokenizer

# A weight of 1 has no colour; colours are strongest from this factor below and above.
FULL = 4.0
OPACITY = 0.7  # of the strongest colour, so that text stays readable
LEGEND = {"≤ 0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1": 1, "1.5": 1.5, "2": 2, "≥ 4": 4}


def write_weights_page(
    path: str | Path, functions: list[dict], *, title: str, caption: str
) -> None:
    """Write one self-contained HTML page: no script, no other file, no network.

    Weights below 1 are blue, above 1 red, on a logarithmic scale from 1/4 to 4; hovering shows the
    weight. A token without text, such as EOS, is shown as a small square.

    Args:
        functions: texts to show, each a dict of ``name``, ``note`` (a line below the name),
            ``tokens`` (their texts, in order), ``weights`` (None where a token is not supervised)
            and ``marked`` (bool, tokens to outline).
        caption: text below the title.

    Raises:
        ValueError: if the lists of a function differ in length, or a weight is negative, infinite
            or NaN.
    """
    sections = []
    for function in functions:
        columns = [function[column] for column in ("tokens", "weights", "marked")]
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{function['name']} has {lengths[0]} tokens, {lengths[1]} weights and "
                f"{lengths[2]} marks: give one of each per token"
            )
        for i, weight in enumerate(function["weights"]):
            if weight is not None and not 0 <= weight < math.inf:  # false for NaN as well
                raise ValueError(
                    f"weight {i} of {function['name']} is {weight}: weights are finite and at "
                    "least 0, None where a token is not supervised"
                )
        spans = "".join(map(_token_span, *columns))
        sections.append(
            f"<h3>{escape(function['name'])}</h3>\n<p class='note'>{escape(function['note'])}</p>\n"
            f"<div class='code'>{spans}</div>\n"
        )
    top = f"<h1>{escape(title)}</h1>\n{paragraph(caption, 'caption')}"
    write_page(path, title, top + legend() + "".join(sections), narrow=True)


def legend() -> str:
    """What the colours mean."""
    scale = "".join(f"<span{_colour(weight)}>{name}</span>" for name, weight in LEGEND.items())
    return (
        f"<p class='legend'>weight {scale} <span class='unsupervised'>not supervised</span>"
        "<span class='marked'>marked</span></p>\n"
    )


def token_texts(tokenizer: "Llama2Tokenizer", ids: list[int]) -> list[str]:
    """Text of every token; joined they give ``tokenizer.decode(ids)``.

    BOS and EOS are empty, and so are the byte tokens of a character except the last, which is the
    whole character; a byte of no character is U+FFFD.
    """
    decoded = tokenizer._spm_model.spm_model.decode(ids, out_type="proto")
    return [piece.surface for piece in decoded.pieces]


def _colour(weight: float | None, *classes: str) -> str:
    """Class and style attributes of a span, with a leading space."""
    names, style = [*classes], ""
    if weight is None:
        names.append("unsupervised")
    elif weight != 1:
        distance = abs(math.log(max(weight, 1 / FULL)) / math.log(FULL))
        names.append("above" if weight > 1 else "below")
        style = f" style='--a:{OPACITY * min(distance, 1):.2f}'"
    return (f" class='{' '.join(names)}'" if names else "") + style


def _token_span(token: str, weight: float | None, marked: bool) -> str:
    shows = {"": ("empty",), "\n": ("newline",)}.get(token, ())
    title = "not supervised" if weight is None else f"weight {weight:.3f}"
    # HTML would read a carriage return as a line feed.
    text = escape(token).replace("\r", "&#13;")
    return f"<span{_colour(weight, *shows, *['marked'] * marked)} title='{title}'>{text}</span>"
