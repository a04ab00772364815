"""Keeps secrets out of what a run writes and prints: config copies, states, logs, errors.

Secret are the user part of a URL, the value of a key or URL parameter that is named like one, and
what the environment holds under such a name (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``), wherever
it stands; so is a value that a config has had under such a key, wherever it came from.
"""

import logging
import os
import re
import sys
import traceback
from functools import cache
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
WORDS = "pass(?:word|wd|phrase)?|pwd|token|secret|credentials?|(?:api|access|account|secret)_?key"
# The last word of a name: neither tokenizer nor max_new_tokens. Or with AWS's ending.
SECRET_NAME = re.compile(rf"(?:.*[_.-])?(?:{WORDS})(?:_id)?", re.IGNORECASE)
# A password may hold anything but space and quotes: what it ends in is the last @. Without one a
# user ends at the first slash, since hf://ORG/NAME@REVISION has none.
USER = r"[^/\s:@'\"<>]*:(?!//)[^\s'\"<>]*|[^/\s]+"
IN_URL = re.compile(rf"(?<=://)(?:{USER})@")
IN_PARAMETER = re.compile(
    rf"(?i)(\b[\w-]*(?:{WORDS}|api-key|sig|signature)=)(?:[^&;\s'\"]+|(['\"]).*?\2)"
)
IN_HEADER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w+/=.~-]{8,}")
KNOWN_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
SHORTEST = 8  # characters of a value that is looked for everywhere: "1" stands in many texts

_seen: set[str] = set()  # values of configs' keys that are named like secrets


def hidden(text: str) -> str:
    """A text that may quote a secret, to be shown or kept."""
    text = IN_URL.sub(f"{HIDDEN}@", text)
    text = IN_HEADER.sub(rf"\1{HIDDEN}", IN_PARAMETER.sub(rf"\1{HIDDEN}", text))
    text = KNOWN_SHAPES.sub(HIDDEN, text)
    for value in sorted(_seen | _of_environment(), key=len, reverse=True):
        if value in text:
            text = text.replace(value, HIDDEN)
    return text


def _of_environment() -> set[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if SECRET_NAME.fullmatch(name) and name != "PWD":  # the shell's working directory
            found |= _spellings(value)
        elif "://" in value and "@" in value:
            found |= _passwords(value)
    return found


@cache
def _spellings(value: str) -> frozenset[str]:
    """As it stands and as URLs have it; none of one too short to be looked for."""
    forms = {value, value.strip(), quote(value), quote(value, safe=""), quote_plus(value)}
    return frozenset(form for form in forms | {unquote(value)} if len(form) >= SHORTEST)


@cache
def _passwords(url: str) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for user in IN_URL.findall(url):
        found |= _spellings(user[:-1].partition(":")[2])
    return found


def remember(value: Any, name: str = "") -> None:
    """Take note of the secrets in dicts, lists and values: from here on texts are shown without."""
    if isinstance(value, dict):
        for key, one in value.items():
            remember(one, str(key))
    elif isinstance(value, list):
        for one in value:
            remember(one, name)
    elif isinstance(value, str) or _is_secret(value, name):
        value = str(value)
        _seen.update(_spellings(value) if SECRET_NAME.fullmatch(name) else _passwords(value))


def _is_secret(value: Any, name: str) -> bool:
    """Whether a key's value hides behind its name: YAML reads a password of digits as a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return bool(value) if isinstance(value, str) else is_number and "token" not in name.lower()


def without_secrets(value: Any, name: str = "") -> Any:
    """The same dicts, lists and values with secrets hidden."""
    if isinstance(value, dict):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one, name) for one in value]
    if SECRET_NAME.fullmatch(name) and _is_secret(value, name):
        return HIDDEN
    return hidden(value) if isinstance(value, str) else value


def guard_output() -> None:
    """What this process logs, and prints of an error that nobody caught, has no secrets."""
    made = logging.getLogRecordFactory()

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        one = made(*args, **options)
        one.msg, one.args = hidden(one.getMessage()), None
        return one

    def tell(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, where))))

    logging.setLogRecordFactory(record)
    sys.excepthook = tell
