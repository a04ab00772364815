"""Compares a program's output with the expected one, token by token, as contests do.

``official`` accepts what DeepMind's checker accepts, so that figures can stand beside published
ones: ``OutputsMatch`` of github.com/google-deepmind/code_contests, execution/tester_sandboxer.cc at
commit 8d1341a, where numbers are what ``absl::SimpleAtod`` reads. ``strict`` is for figures that
mean more: it forgives a difference only where the expected token is a decimal fraction.
"""

import re
from collections.abc import Callable
from itertools import islice

TOLERANCE = 1e-5  # of the absolute difference, in both comparisons; as large a one is too much
SHOWN = 40  # characters of a token in a reason
TOKEN = re.compile(r"[^ \n\t\r\v]+")  # the checker's separators: a form feed is not among them
# Narrower than float(): 1_000, 0x10 and digits of other scripts are text. Possessive (++), to
# avoid backtracking at every digit of a long hostile token.
UNSIGNED = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
NUMBER = re.compile(rf"[+-]?{UNSIGNED}")
NO_NUMBER = re.compile(r"[+-]?(?:nan(?:\([a-z0-9_]*+\))?|inf|infinity)")  # to SimpleAtod it is one
# Without a plus and without a zero before another digit: 0110 may be a code.
CANONICAL = re.compile(rf"-?(?!0[0-9]){UNSIGNED}")
FRACTION = re.compile(r"[^.eE]*[.eE]")
UPPER = {ord(letter): letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}  # only ASCII


def compare_official(expected: str, actual: str) -> str | None:
    """None if DeepMind's checker accepts an output, else one sentence about the first difference.

    The case of ASCII letters does not count. Outputs are equal if all tokens are the same text, or
    if each pair is the same text or are two numbers less than ``TOLERANCE`` apart, integers too,
    read as doubles: large integers that differ may be equal, and unless all tokens are the same
    text, nothing equals an infinity (``1e400`` is one) or a ``nan``. ``actual`` is untrusted.
    """
    wanted, found = _tokens(expected, actual)
    if list(map(_lower, wanted)) == list(map(_lower, found)):
        return None
    return _difference(wanted, found, _same_to_the_checker)


def compare_strict(expected: str, actual: str) -> str | None:
    """None if an output is correct, else one sentence about the first difference.

    If the expected token is a decimal number with a point or an exponent, a number less than
    ``TOLERANCE`` from it is accepted. Anything else must be the same text: words with their case,
    integers without a sign, zeros or a fraction more, and what looks like a number but starts with
    needless zeros. ``actual`` is untrusted.
    """
    return _difference(*_tokens(expected, actual), _same_strictly)


# By the name that a config gives.
COMPARISONS = {"official": compare_official, "strict": compare_strict}


def other_comparison(name: str) -> str:
    """The comparison that a report tells the difference to."""
    return next(other for other in COMPARISONS if other != name)


def _tokens(expected: str, actual: str) -> tuple[list[str], list[str]]:
    wanted = TOKEN.findall(expected)
    # No more than needed: 16 MB of output may be 8 million tokens.
    return wanted, [match[0] for match in islice(TOKEN.finditer(actual), len(wanted) + 1)]


def _difference(
    wanted: list[str], found: list[str], same: Callable[[str, str], bool]
) -> str | None:
    for number, (want, token) in enumerate(zip(wanted, found, strict=False), start=1):
        if not same(want, token):
            return f"token {number} is {_shown(token)}, expected {_shown(want)}"
    if len(found) < len(wanted):
        return f"the output ends after {len(found)} tokens, expected {_shown(wanted[len(found)])}"
    if len(found) > len(wanted):
        extra = _shown(found[-1])
        return f"the output continues after the {len(wanted)} expected tokens with {extra}"
    return None


def _same_to_the_checker(want: str, token: str) -> bool:
    want, token = _lower(want), _lower(token)
    target, value = _number(want), _number(token)
    if target is None or value is None:
        return want == token
    return abs(value - target) < TOLERANCE  # never of infinities and nan


def _same_strictly(want: str, token: str) -> bool:
    if want == token:
        return True
    if not (FRACTION.match(want) and CANONICAL.fullmatch(want) and CANONICAL.fullmatch(token)):
        return False
    return abs(float(token) - float(want)) < TOLERANCE


def _number(token: str) -> float | None:
    """What ``absl::SimpleAtod`` reads from a token in lower case; None if it is text."""
    token = token.strip("\f")
    if NUMBER.fullmatch(token):
        return float(token)
    return float("nan") if NO_NUMBER.fullmatch(token) else None


def _lower(token: str) -> str:
    return token.lower() if token.isascii() else token.translate(UPPER)


def _shown(token: str) -> str:
    if len(token) <= SHOWN:
        return repr(token)
    return f"{token[:SHOWN]!r}... of {len(token)} characters"
