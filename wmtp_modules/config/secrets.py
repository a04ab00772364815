"""Keeps secrets out of what a run writes and prints: config copies, states, logs, errors.

Secret are the user part of a URL, the value of a key or URL parameter that is named like one, and
what the environment holds under such a name (``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``), wherever
it stands.
"""

import os
import re
from typing import Any

HIDDEN = "***"
WORDS = "pass(?:word|wd|phrase)?|pwd|token|secret|credentials?|(?:api|access|account|secret)_?key"
# The last word of a name: neither tokenizer nor max_new_tokens. Or with AWS's ending.
SECRET_NAME = re.compile(rf"(?:.*[_.-])?(?:{WORDS})(?:_id)?", re.IGNORECASE)
IN_URL = re.compile(r"(?<=://)[^/\s]+@")
IN_PARAMETER = re.compile(rf"(?i)(\b[\w-]*(?:{WORDS}|sig)=)[^&;\s'\"]+")
SHORTEST = 8  # characters of a value that is looked for everywhere: "1" stands in many texts


def hidden(text: str) -> str:
    """A text that may quote a secret, to be shown or kept."""
    text = IN_PARAMETER.sub(rf"\1{HIDDEN}", IN_URL.sub(f"{HIDDEN}@", text))
    for name, value in os.environ.items():
        is_secret = SECRET_NAME.fullmatch(name) and name != "PWD"  # the shell's working directory
        if is_secret and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def without_secrets(value: Any, name: str = "") -> Any:
    """The same dicts, lists and values with secrets hidden."""
    if isinstance(value, dict):
        return {key: without_secrets(one, str(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one, name) for one in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and SECRET_NAME.fullmatch(name) else hidden(value)
