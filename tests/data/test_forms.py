"""Every form of a row: which characters are supervised, and what weight each token has."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_modules.data import contamination, rows_dataset
from wmtp_modules.data.forms import ALPACA, Reader
from wmtp_modules.data.rows import check_one_response_each
from wmtp_modules.data.sources import BadRow
from wmtp_modules.data.tokenize import encode_pair, encode_text, encode_turns, encode_with_offsets

LONG = 400
PAIR = {"prompt": "Wie heißt 漢?\n", "response": " über 😀 = 1\n"}


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_path):
    from torchtune.models.llama2 import llama2_tokenizer

    return llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=LONG)


def rows_of(tokenizer, make_jsonl, *records, **arguments):
    return rows_dataset(tokenizer, source=make_jsonl(*records), **arguments)


def documents(row, tokenizer):
    """(text, supervised text) of each document of a row: BOS, tokens, EOS."""
    found = []
    for token, keep in zip(row["tokens"], row["keep"], strict=True):
        if token == tokenizer.bos_id:
            found.append(([], []))
            assert not keep
        else:
            found[-1][0].append(token)
            found[-1][1].extend([token] * keep)
    for tokens, kept in found:
        assert tokens[-1] == kept[-1] == tokenizer.eos_id
    return [(tokenizer.decode(a[:-1]), tokenizer.decode(b[:-1])) for a, b in found]


def test_forms_of_one_response_are_pairs(tokenizer, make_jsonl):
    prompt, response = PAIR.values()
    (want,) = rows_of(tokenizer, make_jsonl, PAIR)
    assert documents(want, tokenizer) == [(prompt + response, response)]
    (completion,) = rows_of(tokenizer, make_jsonl, {"prompt": prompt, "completion": response})
    assert completion == want
    for extra, kind in (({"input": "x\n{y}"}, "prompt_input"), ({}, "prompt_no_input")):
        record = {"instruction": "Say {input}", "output": response, **extra}
        (row,) = rows_of(tokenizer, make_jsonl, record)
        filled = (
            ALPACA[kind].replace("{input}", extra.get("input", ""), 1) if extra else ALPACA[kind]
        )
        filled = filled.replace("{instruction}", "Say {input}")
        assert row["prompt"] == filled
        assert documents(row, tokenizer) == [(filled + response, response)]
    (blank,) = rows_of(tokenizer, make_jsonl, {"instruction": "a", "input": " ", "output": "b"})
    assert blank["prompt"] == ALPACA["prompt_no_input"].format(instruction="a")


def said(*contents):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_of_messages_only_what_the_assistant_says_is_supervised(tokenizer, make_jsonl):
    messages = [
        {"role": "system", "content": "Sei kurz, ß!"},
        *said("漢?", "  def é():\n", "und 😀", "x"),
    ]
    (row,) = rows_of(tokenizer, make_jsonl, {"messages": messages})
    first, second = (
        "[INST] <<SYS>>\nSei kurz, ß!\n<</SYS>>\n\n漢? [/INST] ",
        "[INST] und 😀 [/INST] ",
    )
    one, other = documents(row, tokenizer)
    assert one == (first + "  def é():\n", "  def é():\n")
    # The space before it is the template's, unless it is in one token with the x.
    assert other in [(second + "x", "x"), (second + "x", " x")]
    assert "prompt" not in row  # there is no one response
    (one,) = rows_of(tokenizer, make_jsonl, {"messages": said("漢?", "é")})
    assert (one["prompt"], one["response"]) == ("[INST] 漢? [/INST] ", "é")
    # As Arrow may hold them.
    fields = {name: [m[name] for m in messages] for name in ("role", "content")}
    assert Reader()({"messages": fields}) == Reader()({"messages": messages})


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "messages is empty"),
        ("hi", "messages is not a list of"),
        ([3], "messages is not a list of"),
        ({"role": ["user"]}, "messages is not a list of"),
        (said("a"), "message 1 is the last and not the assistant's"),
        (said("a", "b", "c"), "message 3 is the last and not the assistant's"),
        ([said("a", "b")[1]], "message 1 is of 'assistant', where user must speak"),
        ([*said("a"), *said("a", "b")], "message 2 is of 'user', where assistant must speak"),
        ([*said("a"), {"role": "tool", "content": "x"}], "message 2 is of 'tool'"),
        ([*said("a", "b"), {"role": "system", "content": "x"}], "message 3 is of 'system'"),
        ([*said("a"), {"role": "assistant", "content": None}], "message 2: content is missing"),
        ([*said("a"), {"role": "assistant", "content": ["x"]}], "message 2: content is list"),
        ([*said("a"), {"role": "assistant", "content": " "}], "message 2: content is empty"),
        ([*said("a"), {"role": "assistant", "content": "b", "weight": 0}], "weight of its own"),
    ],
)
def test_messages_that_cannot_be_used(messages, why):
    with pytest.raises(BadRow, match=why):
        Reader()({"messages": messages})


def test_other_names(tokenizer, make_jsonl):
    (want,) = rows_of(tokenizer, make_jsonl, PAIR)
    prompt, response = PAIR.values()
    record = {"question": prompt, "answer": response, "text": "both", "prompt": "no", "messages": 3}
    columns = {"prompt": "question", "response": "answer"}
    (row,) = rows_of(tokenizer, make_jsonl, record, columns=columns)
    assert row == want
    # Names that are not changed stay: here instruction, and no input.
    columns = {"output": "answer", "weight": "score"}
    record = {"instruction": "q", "answer": "a", "input": None, "text": "both", "score": 3}
    (row,) = rows_of(tokenizer, make_jsonl, record, columns=columns)
    assert (row["response"], row["weight"][-1]) == ("a", 3.0)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: body is empty"):
        rows_of(tokenizer, make_jsonl, {"body": " "}, columns={"text": "body"})
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: fields missing: expected body, the row has"
    ):
        rows_of(tokenizer, make_jsonl, {"text": "a"}, columns={"text": "body"})
    for columns, message in (
        ({"respons": "x"}, r"columns\.respons is not a field of a row \(did you mean response\?"),
        ({"text": ""}, "must be the name of a column"),
        ({"prompt": "a", "response": "a"}, "names 'a' twice"),
        ({"text": "a", "output": "b"}, "columns names output, text, which no form of a row has"),
    ):
        with pytest.raises(ValueError, match=message):
            Reader(columns)


@pytest.mark.parametrize(
    "record",
    [
        PAIR | {"text": "a"},
        PAIR | {"completion": "a"},
        PAIR | {"messages": said("a", "b")},
        {"text": "a", "messages": said("a", "b")},
        {"text": "a", "instruction": "b", "output": "c"},
    ],
)
def test_a_row_of_two_forms_is_refused_and_told_how_to_choose(record):
    with pytest.raises(BadRow, match=r"fields .*: expected .*prompt and completion"):
        Reader()(record)


# ----------------------------------------------------------------------------- weights

# U+2581 is SentencePiece's own sign for a space: the oracle cannot tell them apart.
texts = st.text("def (x):\n\t return é漢😀", min_size=1, max_size=40)


@st.composite
def weighted(draw):
    """A text and spans that do not overlap, [start, end, weight]."""
    text = draw(texts)
    cuts = sorted(set(draw(st.lists(st.integers(0, len(text)), max_size=6))))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return text, [(a, b, draw(st.sampled_from([0.0, 0.1, 2.0, 7.5]))) for a, b in pairs]


def brute_force(text, spans, begin, end):
    values = [next((w for a, b, w in spans if a <= i < b), 1.0) for i in range(len(text))]
    own = values[begin:end] or values[begin : begin + 1]
    return sum(own) / len(own), values[-1]


@settings(max_examples=100, deadline=None)
@given(prompt=texts, drawn=weighted())
def test_a_token_has_the_mean_weight_of_its_characters(tokenizer, prompt, drawn):
    text, spans = drawn
    _, places = encode_with_offsets(tokenizer, text)
    row = encode_text(tokenizer, text, (), tuple(spans))
    want = [brute_force(text, spans, b, e)[0] for b, e in places]
    last = brute_force(text, spans, 0, 1)[1]
    np.testing.assert_allclose(row.weight, [1.0, *want, last], rtol=1e-6)
    n = len(prompt)
    _, places = encode_with_offsets(tokenizer, prompt + text)
    row = encode_pair(tokenizer, prompt, text, (), tuple(spans))
    want = [brute_force(text, spans, max(b - n, 0), e - n)[0] if e > n else 1.0 for b, e in places]
    np.testing.assert_allclose(row.weight, [1.0, *want, last], rtol=1e-6)


def test_one_number_is_a_span_over_all(tokenizer):
    for encode, *texts in ((encode_text, "é漢 = 1"), (encode_pair, "a ", "é漢 = 1")):
        number = encode(tokenizer, *texts, weight=0.3)
        whole = encode(tokenizer, *texts, weight=((0, 7, 0.3),))
        np.testing.assert_array_equal(number.weight[1:], whole.weight[1:])
        assert number.weight[-1] == np.float32(0.3)
    turns = encode_turns(tokenizer, [("a ", "b"), ("c ", "d")], 0.3)
    np.testing.assert_array_equal(turns.weight, np.where(turns.keep, np.float32(0.3), 1))


def test_weights_of_rows_are_kept_and_rows_without_have_none(tokenizer, make_jsonl):
    spans = [[0.0, 2.0, 0.5], [2, 4, 3]]
    rows = rows_of(tokenizer, make_jsonl, PAIR | {"weight": spans}, PAIR, PAIR | {"weight": 2})
    encoded = encode_pair(tokenizer, *PAIR.values(), weight=((0, 2, 0.5), (2, 4, 3.0)))
    assert rows[0]["weight"] == encoded.weight.tolist()
    assert rows[1]["weight"] is None
    assert set(rows[2]["weight"]) == {1.0, 2.0}
    assert "weight" not in rows_of(tokenizer, make_jsonl, PAIR).column_names


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (-1, "weight is -1, not a number from 0 on"),
        (True, "weight is True"),
        ("2", "weight is '2'"),
        (float("nan"), "weight is nan"),
        (float("inf"), "weight is inf"),
        ({"a": 1}, "weight is {'a': 1}"),
        ([[0, 3, 1]], r"weight span \[0, 3, 1\] is not .* within 2 characters"),
        ([[1, 1, 1]], "weight span"),
        ([[-1, 1, 1]], "weight span"),
        ([[0, 1.5, 1]], "weight span"),
        ([[0, 1]], "weight span"),
        ([[0, 1, None]], "weight span"),
        ([[0, 2, 1], [1, 2, 2]], r"weight spans .* overlap"),
    ],
)
def test_weights_that_cannot_be_used(weight, why):
    with pytest.raises(BadRow, match=why):
        Reader()({"text": "ab", "weight": weight})


def test_spans_need_one_response():
    several = {"messages": said("a", "b", "c", "d")}
    for marks in ({"weight": [[0, 1, 2]]}, {"noise": [[0, 1]]}):
        with pytest.raises(BadRow, match="the messages have several"):
            Reader()(several | marks)
        assert Reader()({"messages": said("a", "b")} | marks)


# ----------------------------------------------------------------------------- keeping out


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Secret words here", "completion": "x"},
        {"instruction": "Secret words", "input": "here", "output": "x"},
        {"instruction": "a", "output": "secret words here"},
        {"messages": said("a", "b", "secret words here", "d")},
        {"messages": [{"role": "system", "content": "secret words here"}, *said("a", "b")]},
        {"messages": said("a", "secret words here", "c", "d")},
        {"body": "Secret words here"},
    ],
)
def test_evaluation_tasks_are_found_in_every_form(tokenizer, make_jsonl, record, monkeypatch):
    class Guard:
        def find_each(self, texts):
            return list(map(self.find, texts))

        def find(self, text):
            words = contamination.words_of(text)
            words = [w for w in words if w not in ("input",)]
            at = range(len(words))
            return next(
                (f"T/{i}" for i in at if words[i : i + 3] == ["secret", "words", "here"]), None
            )

    monkeypatch.setattr(contamination, "EvaluationGuard", Guard)
    columns = {"text": "body"} if "body" in record else None
    with pytest.raises(ValueError, match=r"no row remains.*1 rows that contain an evaluation task"):
        rows_of(tokenizer, make_jsonl, record, columns=columns)


def test_a_conversation_is_on_the_side_of_its_first_prompt(tokenizer, make_jsonl):
    records = [{"messages": said(f"q{i}", "a", f"r{j}", "b")} for i in range(30) for j in range(3)]
    sides = []
    for split in ("train", "validation"):
        rows = rows_of(tokenizer, make_jsonl, *records, split=split, validation_fraction=0.3)
        sides.append({documents(row, tokenizer)[0][0] for row in rows})
    assert len(sides[0]) + len(sides[1]) == 30
    assert not sides[0] & sides[1]


def test_an_over_long_conversation_is_left_out(tokenizer, make_jsonl):
    long = {"messages": said("a", "word " * 300, "b", "c")}
    assert len(rows_of(tokenizer, make_jsonl, long, PAIR)) == 1
    assert json.dumps(long)


def test_what_rates_responses_refuses_rows_of_several(tokenizer, make_jsonl):
    one, many = {"messages": said("a", "b")}, {"messages": said("a", "b", "c", "d")}
    check_one_response_each(rows_of(tokenizer, make_jsonl, one, PAIR, {"text": "a"}))
    with pytest.raises(ValueError, match="row 1 of the data set has 2 turns of the assistant"):
        check_one_response_each(rows_of(tokenizer, make_jsonl, PAIR, many))
