"""The forms of a row, and what of it is trained on.

- ``text``: everything.
- ``prompt``, ``response`` (or ``completion``): the response.
- ``instruction``, ``input`` (may be left out or empty), ``output``: the output, after a prompt in
  Alpaca's template.
- ``messages``, a list of ``{role, content}``: what the assistant says. Each exchange is a document
  of Llama-2's chat format of its own, ``<s>[INST] user [/INST] assistant</s>``, and follows those
  before it; a system message stands in the first as ``<<SYS>>``. Contents are taken as they are.

In all of them ``reward``, ``problem_id``, ``noise`` and ``weight`` may stand beside.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torchtune.data import AlpacaToMessages
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.config.components import closest
from wmtp_modules.data import tokenize
from wmtp_modules.data.sources import BadRow, string_field, text_field

FORMS = (
    ("text",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("messages",),
)
MARKS = ("reward", "problem_id", "noise", "weight")
FIELDS = (*dict.fromkeys(field for form in FORMS for field in form), "input", *MARKS)
ALPACA = AlpacaToMessages().template


@dataclass(frozen=True)
class Sample:
    """A training sample: plain text (no prompt), or a response to a prompt, maybe after others."""

    response: str
    prompt: str | None = None
    noise: tuple[tuple[int, int], ...] = ()  # [start, end) in characters of the response
    reward: float | None = None
    problem_id: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()  # prompts and responses of a conversation before it
    # Of every token, or of [start, end) in characters of the response.
    weight: float | tuple[tuple[int, int, float], ...] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether there is one response to one prompt, and that is all."""
        return self.prompt is not None and not self.earlier

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All prompts and responses; a plain text has an empty prompt."""
        return (*self.earlier, (self.prompt or "", self.response))

    @property
    def first_prompt(self) -> str | None:
        return self.earlier[0][0] if self.earlier else self.prompt

    @property
    def all_text(self) -> str:
        return "\n".join(text for turn in self.turns for text in turn)

    def encode(self, tokenizer: Llama2Tokenizer) -> tokenize.TokenRow:
        """The tokens of prompts and responses."""
        assert self.prompt is not None
        if not self.earlier:
            return tokenize.encode_pair(
                tokenizer, self.prompt, self.response, self.noise, self.weight
            )
        assert not isinstance(self.weight, tuple)  # ``Reader`` has seen to that
        return tokenize.encode_turns(tokenizer, self.turns, self.weight)


class Reader:
    """Turns records into samples.

    Args:
        columns: by field, the name that it has in the source. The forms that have all of these
            fields are then the only ones that a row may have, whatever else stands in it.

    Attributes:
        columns: all names to read.
        cells: those that are no text, which a csv file holds as JSON.

    Raises:
        ValueError: if ``columns`` has an unknown field, or one name twice.
    """

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        columns = dict(columns or {})
        for field, name in columns.items():
            if field not in FIELDS:
                near = closest(str(field), FIELDS)
                hint = f"did you mean {near}?" if near else f"known: {', '.join(FIELDS)}"
                raise ValueError(f"columns.{field} is not a field of a row ({hint})")
            if not isinstance(name, str) or not name:
                raise ValueError(f"columns.{field} must be the name of a column, got {name!r}")
            if list(columns.values()).count(name) > 1:
                raise ValueError(f"columns names {name!r} twice: a column is one field")
        self._name = {field: columns.get(field, field) for field in FIELDS}
        chosen = {field for field in columns if field not in (*MARKS, "input")}
        if "input" in columns:
            chosen |= {"instruction"}
        self._forms = [form for form in FORMS if chosen <= set(form)]
        self._is_chosen = bool(chosen)
        if not self._forms:
            raise ValueError(
                f"columns names {', '.join(sorted(chosen))}, which no form of a row has"
            )
        self.columns = tuple(self._name.values())
        self.cells = tuple(self._name[f] for f in ("messages", "reward", "noise", "weight"))

    def __call__(self, record: dict) -> list[Sample]:
        """The sample of a record; ``BadRow`` if it has none."""
        row = {field: record.get(name) for field, name in self._name.items()}
        present = {field for field, value in row.items() if value is not None}
        whole = [form for form in self._forms if present.issuperset(form)]
        is_old = whole in ([("text",)], [("prompt", "response")])
        if is_old and not self._is_chosen:  # half of another form makes it unclear what is meant
            others = {"text", "prompt", "response"} & present
            whole = [form for form in whole if others <= set(form)]
        if len(whole) != 1:
            raise self._unclear(row, len(whole) > 1)
        form = whole[0]
        reward, problem_id = _reward(row["reward"]), _problem_id(row["problem_id"])
        earlier: list[tuple[str, str]] = []
        if form == ("messages",):
            *earlier, (prompt, response) = _turns(row["messages"])
        else:
            texts = [self._text(row, field) for field in form]
            if form == ("instruction", "output"):
                extra = string_field(row, "input") if row["input"] is not None else ""
                kind = "prompt_input" if extra.strip() else "prompt_no_input"
                texts[0] = ALPACA[kind].format(instruction=texts[0], input=extra)
            prompt, response = (texts[0] if len(texts) > 1 else None), texts[-1]
        noise = _spans(row["noise"] or [], len(response))
        weight = _weight(row["weight"], len(response))
        if earlier and (noise or isinstance(weight, tuple)):
            why = "spans count characters of one response, and the messages have several"
            raise BadRow(f"{'noise' if noise else 'weight'}: {why}", why)
        return [Sample(response, prompt, noise, reward, problem_id, tuple(earlier), weight)]

    def _text(self, row: dict, field: str) -> str:
        try:
            return text_field(row, field)
        except BadRow as error:
            told = self._name[field]
            raise BadRow(str(error).replace(field, told, 1), error.kind) from error

    def _unclear(self, row: dict, many: bool) -> BadRow:
        content = [f for form in FORMS for f in form]
        present = [self._name[f] for f in dict.fromkeys(content) if row[f] is not None]
        ways = [" and ".join(self._name[field] for field in form) for form in self._forms]
        expected = "expected " + ", or ".join(ways)
        if many:
            expected += "; columns says which, as in columns: {text: text}"
        return BadRow(f"fields {', '.join(present) or 'missing'}: {expected}", expected)


def _turns(messages: object) -> list[tuple[str, str]]:
    """Prompts and responses of a conversation, in Llama-2's chat format."""
    if isinstance(messages, dict):  # how Arrow may hold a list of messages: a list of each field
        try:
            pairs = zip(messages["role"], messages["content"], strict=True)
            messages = [{"role": role, "content": content} for role, content in pairs]
        except (KeyError, TypeError, ValueError):
            raise BadRow("messages is not a list of {role, content}") from None
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise BadRow("messages is not a list of {role, content}")
    if not messages:
        raise BadRow("messages is empty")
    system, turns, asked = "", [], None
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        try:
            content = text_field(message, "content")
        except BadRow as error:
            raise BadRow(f"message {number}: {error}", error.kind) from error
        if message.get("weight") not in (None, 1):
            raise BadRow(f"message {number} has a weight of its own, only a row can", "weight")
        expected = "assistant" if asked is not None else "user"
        if role == "system" and number == 1:
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role != expected:
            why = f"is of {role!r}, where {expected} must speak"
            raise BadRow(f"message {number} {why}", "order of the messages")
        elif role == "user":
            asked = f"[INST] {system}{content} [/INST] "
            system = ""
        else:
            turns.append((asked, content))
            asked = None
    if asked is not None or not turns:
        raise BadRow(f"message {len(messages)} is the last and not the assistant's", "last message")
    return turns


def _reward(reward: object) -> float | None:
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise BadRow(f"reward is {reward!r}, not a number", "reward")
    try:
        return float(reward)  # NaN stays: a critic rejects it, and dropping the row would hide it
    except OverflowError as error:
        raise BadRow(f"reward is {reward}", "large reward") from error


def _problem_id(problem_id: object) -> str | None:
    if problem_id is None:
        return None
    if isinstance(problem_id, bool) or not isinstance(problem_id, int | str):
        raise BadRow(f"problem_id is {problem_id!r}, not a string or an integer", "problem_id")
    return str(problem_id)


def _spans(noise: object, length: int) -> tuple[tuple[int, int], ...]:
    spans = noise if isinstance(noise, list) else [noise]
    for span in spans:
        is_pair = isinstance(span, list) and [type(x) for x in span] == [int, int]
        if not is_pair or not 0 <= span[0] < span[1] <= length:
            why = f"noise span {span!r} is not [start, end) within {length} characters"
            raise BadRow(why, "noise span")
    return tuple((start, end) for start, end in spans)


def _weight(weight: object, length: int) -> float | tuple[tuple[int, int, float], ...] | None:
    """A number, or spans [start, end, weight]; columns of numbers may hold 3 as 3.0."""
    if weight is None or _is_weight(weight):
        return None if weight is None else float(weight)  # pyrefly: ignore[bad-argument-type]
    if not isinstance(weight, list):
        told = repr(weight)[:99]
        raise BadRow(
            f"weight is {told}, not a number from 0 on, or spans [start, end, weight]", "weight"
        )
    spans = []
    for span in weight:
        is_span = isinstance(span, list) and len(span) == 3 and all(map(_is_weight, span))
        if not is_span or any(x != int(x) for x in span[:2]) or not span[0] < span[1] <= length:
            raise BadRow(
                f"weight span {span!r} is not [start, end, weight] within {length} characters",
                "weight span",
            )
        spans.append((int(span[0]), int(span[1]), float(span[2])))
    for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if other[0] < one[1]:
            raise BadRow(f"weight spans {[*one]} and {[*other]} overlap", "weight spans overlap")
    return tuple(spans)


def _is_weight(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= 1e30 and math.isfinite(value)
