"""Compares a program's output with the expected one, token by token, as contests do."""

import math
import re

TOLERANCE = 1e-5  # of the absolute or the relative difference
SHOWN = 40  # characters of a token in a reason
# Narrower than float(): nan, inf, 1_000 and digits of other scripts are text. Possessive (++), to
# avoid backtracking at every digit of a long hostile token.
INTEGER = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


def compare_outputs(expected: str, actual: str) -> str | None:
    """None if an output is correct, else one sentence about the first difference.

    The kind and amount of white space do not matter. Integers must be equal as numbers, however
    many digits they have. If the expected token has a decimal point or an exponent, a number within
    ``TOLERANCE`` of it (absolute, or relative to the expected one) is accepted. Anything else must
    be the same text. ``actual`` is untrusted.
    """
    wanted = expected.split()
    # Split no further than needed: 16 MB of output may be 8 million tokens.
    found = actual.split(None, len(wanted))
    for number, (want, token) in enumerate(zip(wanted, found, strict=False), start=1):
        if not _same(want, token):
            return f"token {number} is {_shown(token)}, expected {_shown(want)}"
    if len(found) < len(wanted):
        return f"the output ends after {len(found)} tokens, expected {_shown(wanted[len(found)])}"
    if len(found) > len(wanted):
        extra = _shown(found[-1].split(None, 1)[0])
        return f"the output continues after the {len(wanted)} expected tokens with {extra}"
    return None


def _same(want: str, token: str) -> bool:
    if want == token:
        return True
    if INTEGER.fullmatch(want):
        return _integer(want) == _integer(token)
    if not DECIMAL.fullmatch(want) or not DECIMAL.fullmatch(token):
        return False
    target, value = float(want), float(token)
    # A number too large for a float is infinite, and any number is within infinity.
    return math.isfinite(target) and abs(value - target) <= TOLERANCE * max(1.0, abs(target))


def _integer(token: str) -> tuple[str, str] | None:
    """Sign and digits, as text: int() of a million digits takes seconds, or raises."""
    if not INTEGER.fullmatch(token):
        return None
    digits = token.lstrip("+-").lstrip("0")
    return ("-" if token[0] == "-" and digits else "", digits)


def _shown(token: str) -> str:
    if len(token) <= SHOWN:
        return repr(token)
    return f"{token[:SHOWN]!r}... of {len(token)} characters"
