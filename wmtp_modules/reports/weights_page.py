"""Writes a page of texts with every token coloured by its weight."""

import math
from html import escape
from pathlib import Path

from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.files import new_file

# A weight of 1 has no colour; colours are strongest from this factor below and above.
FULL = 4.0
OPACITY = 0.7  # of the strongest colour, so that text stays readable
LEGEND = {"≤ 0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1": 1, "1.5": 1.5, "2": 2, "≥ 4": 4}

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --grey: #7a828c; --line: #d5d9de;
  --above: 218 30 40; --below: 25 95 220; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --page: #15181c; --grey: #858d97; --line: #363c44;
    --above: 255 70 75; --below: 70 140 255; --mark: #ffd75e; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--text);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 0; }
.note { margin: 0 0 .5rem; } .note, .caption { color: var(--grey); }
.code, .legend { font-family: ui-monospace, Menlo, Consolas, monospace; }
.code { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; font-size: .9rem;
  padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .4rem; }
.legend { font-size: .8rem; position: sticky; top: 0; padding: .5rem 0; background: var(--page); }
.legend span { display: inline-block; padding: .1rem .5rem; margin-right: .15rem; }
.above { background: rgb(var(--above) / var(--a)); }
.below { background: rgb(var(--below) / var(--a)); }
.unsupervised { color: var(--grey); }
.marked { outline: 2px solid var(--mark); outline-offset: -1px; border-radius: .15rem; }
.newline::before { content: "\\21B5"; color: var(--grey); }
.empty::before { content: "\\25A1"; color: var(--grey); }
"""


def write_weights_page(
    path: str | Path, functions: list[dict], *, title: str, caption: str
) -> None:
    """Write one self-contained HTML page: no script, no other file, no network.

    Weights below 1 are blue, above 1 red, on a logarithmic scale from 1/4 to 4; hovering shows the
    weight. A token without text, such as EOS, is shown as a small square.

    Args:
        path: file to write.
        functions: texts to show, each a dict of ``name``, ``note`` (a line below the name),
            ``tokens`` (their texts, in order), ``weights`` (None where a token is not supervised)
            and ``marked`` (bool, tokens to outline).
        title: of the page.
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
            f"<h2>{escape(function['name'])}</h2>\n<p class='note'>{escape(function['note'])}</p>\n"
            f"<div class='code'>{spans}</div>\n"
        )
    legend = "".join(f"<span{_colour(weight)}>{name}</span>" for name, weight in LEGEND.items())
    page = (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p class='caption'>{escape(caption)}</p>\n"
        f"<p class='legend'>weight {legend} <span class='unsupervised'>not supervised</span>"
        "<span class='marked'>mutated</span></p>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )
    with new_file(Path(path)) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def token_texts(tokenizer: Llama2Tokenizer, ids: list[int]) -> list[str]:
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
