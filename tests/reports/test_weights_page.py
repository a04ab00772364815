import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.reports.weights_page import token_texts, write_weights_page

CODE = "def f(x):\n    return x < 1 & 'é😀'\t\r\n"


class Page(HTMLParser):
    """Collects the spans of every code block, and the text of each block."""

    def __init__(self, html):
        super().__init__()
        self.spans, self.texts, self.tags, self._depth = [], [], [], 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "div":
            self._depth = 1
            self.texts.append("")
        if tag == "span" and self._depth:
            self.spans.append(attributes)

    def handle_endtag(self, tag):
        if tag == "div":
            self._depth = 0

    def handle_data(self, data):
        if self._depth:
            self.texts[-1] += data


def function(tokens, weights=None, marked=None, **changes):
    return {
        "name": "f",
        "note": "a note",
        "tokens": tokens,
        "weights": weights or [1.0] * len(tokens),
        "marked": marked or [False] * len(tokens),
    } | changes


@pytest.fixture
def make_page(tmp_path):
    def make(*functions, title="Weights", caption="What it shows"):
        write_weights_page(tmp_path / "page.html", [*functions], title=title, caption=caption)
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return make


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path):
    return llama2_tokenizer(str(tiny_tokenizer_path))


def test_page_shows_the_source_with_one_span_a_token(make_page, tokenizer):
    ids = tokenizer.encode(CODE)
    tokens = token_texts(tokenizer, ids)
    page = Page(make_page(function(tokens), function(["\n", "  b"])))
    # HTMLParser unescapes each token; newlines, indentation and the carriage return are all there.
    assert page.texts == [CODE, "\n  b"]
    assert len(page.spans) == len(ids) + 2
    assert {span["title"] for span in page.spans} == {"weight 1.000"}


def test_everything_is_escaped(make_page):
    evil = "<script>alert('\"&amp;')</script>"
    html = make_page(function([evil], name=evil, note=evil), title=evil, caption=evil)
    page = Page(html)
    assert page.texts == [evil]
    assert "script" not in {tag for tag, _ in page.tags}
    assert html.count("&lt;script&gt;alert(&#x27;&quot;&amp;amp;&#x27;)&lt;/script&gt;") == 6
    assert not re.search(r"https?:|src=|href=|url\(|@import", html)


def test_colour_follows_the_weight(make_page):
    weights = [None, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0]
    spans = Page(make_page(function(list("abcdefghi"), weights))).spans
    assert [span["title"] for span in spans[:3]] == [
        "not supervised",
        "weight 0.000",
        "weight 0.100",
    ]
    assert [span.get("class") for span in spans] == [
        "unsupervised",
        *["below"] * 4,
        None,
        *["above"] * 3,
    ]
    alphas = [span.get("style", "").removeprefix("--a:") for span in spans]
    assert alphas == ["", "0.70", "0.70", "0.70", "0.35", "", "0.35", "0.70", "0.70"]


def test_marks_newlines_and_empty_tokens_have_a_class(make_page):
    tokens, weights = ["", "a", "\n", "b", ""], [None, 2.0, 1.0, 1.0, 1.0]
    page = Page(make_page(function(tokens, weights, [False, True, False, True, False])))
    assert [span.get("class") for span in page.spans] == [
        "empty unsupervised",
        "marked above",
        "newline",
        "marked",
        "empty",
    ]
    assert page.texts == ["a\nb"]


def test_bad_functions_are_refused(make_page):
    with pytest.raises(ValueError, match="f has 2 tokens, 1 weights and 2 marks: give one of each"):
        make_page(function(["a", "b"], [1.0]))
    with pytest.raises(ValueError, match="f has 2 tokens, 2 weights and 3 marks: give one of each"):
        make_page(function(["a", "b"], marked=[True] * 3))
    for weight in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"weight 1 of f is {weight}: weights are finite"):
            make_page(function(["a", "b"], [1.0, weight]))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(1, 511), max_size=20))
def test_texts_of_any_tokens_join_to_what_they_decode_to(tokenizer, ids):
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_of_several_bytes_shows_at_the_last(tokenizer):
    ids = tokenizer.encode("a😀b")
    assert token_texts(tokenizer, ids) == ["", "a", "", "", "", "😀", "b", ""]
    assert token_texts(tokenizer, ids[:4]) == ["", "a", "\ufffd", "\ufffd"]
