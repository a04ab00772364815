"""Whether a program's output is the expected one: token by token, as contests judge."""

import math
import re

TOLERANCE = 1e-5  # either of the absolute and the relative difference may be within it
SHOWN = 40  # characters of a token in a reason
# Less than float() takes: nan, inf, 1_000 and digits of other scripts are text. Possessive (++), so
# that a long hostile token is not tried again at every digit.
INTEGER = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


def compare_outputs(expected: str, actual: str) -> str | None:
    """Compare two outputs; kind and amount of white space do not matter.

    An integer must be equal as a number, however many digits it has. Where the expected token has
    a decimal point or an exponent, a number within ``TOLERANCE`` of it (absolute, or relative to
    the expected one) is right. Anything else must be the same text.

    Args:
        expected: from the test.
        actual: from the program, hostile until proven otherwise.

    Returns:
        None if the output is right, else the first difference in one sentence.
    """
    wanted = expected.split()
    # No more pieces than are needed: an output of 16 MB may be 8 million tokens.
    found = actual.split(None, len(wanted))
    for number, (want, token) in enumerate(zip(wanted, found, strict=False), start=1):
        if not _same(want, token):
            return f"token {number} is {_shown(token)}, expected {_shown(want)}"
    if len(found) < len(wanted):
        return f"the output ends after {len(found)} tokens, expected {_shown(wanted[len(found)])}"
    if len(found) > len(wanted):
        extra = _shown(found[-1].split(None, 1)[0])
        return f"the output goes on after the {len(wanted)} expected tokens with {extra}"
    return None


def _same(want: str, token: str) -> bool:
    if want == token:
        return True
    if INTEGER.fullmatch(want):
        return _integer(want) == _integer(token)
    if not DECIMAL.fullmatch(want) or not DECIMAL.fullmatch(token):
        return False
    target, value = float(want), float(token)
    # What is too large for a float is infinite, and everything would be within infinity.
    return math.isfinite(target) and abs(value - target) <= TOLERANCE * max(1.0, abs(target))


def _integer(token: str) -> tuple[str, str] | None:
    """Sign and digits. As text: int() of a million digits takes seconds, or refuses."""
    if not INTEGER.fullmatch(token):
        return None
    digits = token.lstrip("+-").lstrip("0")
    return ("-" if token[0] == "-" and digits else "", digits)


def _shown(token: str) -> str:
    if len(token) <= SHOWN:
        return repr(token)
    return f"{token[:SHOWN]!r}... of {len(token)} characters"
