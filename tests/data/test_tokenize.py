from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.data.tokenize import encode_pair, encode_text, encode_with_offsets, split_row


@pytest.fixture(scope="session")
def llama_tokenizer(tiny_tokenizer_path, tmp_path_factory):
    """As Llama-2's: a space is put before every text."""
    prefix = tmp_path_factory.mktemp("llama") / "tokenizer"
    spm.SentencePieceTrainer.train(
        input=str(Path(tiny_tokenizer_path).with_name("corpus.txt")),
        model_prefix=str(prefix),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        pad_id=-1,
        minloglevel=2,
    )
    return llama2_tokenizer(str(prefix) + ".model", max_seq_len=64)


def spans_by_bytes(tokenizer, text, n_dummy):
    """Oracle: walk over the UTF-8 bytes of the pieces."""
    processor = tokenizer._spm_model.spm_model
    char_of_byte = [-1] * n_dummy
    for i, char in enumerate(text):
        char_of_byte += [i] * len(char.encode())
    spans, at = [], 0
    for token in tokenizer.encode(text, add_bos=False, add_eos=False):
        piece = processor.id_to_piece(token).replace("\u2581", " ")
        size = 1 if processor.is_byte(token) else len(piece.encode())
        chars = [c for c in char_of_byte[at : at + size] if c >= 0]
        spans.append((chars[0], chars[-1] + 1) if chars else (0, 0))
        at += size
    assert at == len(char_of_byte)
    return spans


# U+2581 is SentencePiece's own sign for a space: the oracle cannot tell them apart.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), min_size=1)
code = st.text("def (x):\n\t return é漢😀", min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(text=texts | code)
def test_offsets_name_the_characters_of_every_token(tokenizer, llama_tokenizer, text):
    for tok, n_dummy in ((tokenizer, 0), (llama_tokenizer, 1)):
        ids, spans = encode_with_offsets(tok, text)
        assert ids == tok.encode(text, add_bos=False, add_eos=False)
        assert spans == spans_by_bytes(tok, text, n_dummy)


@settings(max_examples=100, deadline=None)
@given(prompt=texts | code, response=texts | code)
def test_pair_supervises_tokens_that_touch_the_response(
    tokenizer, llama_tokenizer, prompt, response
):
    for tok, n_dummy in ((tokenizer, 0), (llama_tokenizer, 1)):
        row = encode_pair(tok, prompt, response)
        assert row.tokens.tolist() == tok.encode(prompt + response)
        touches = [end > len(prompt) for _, end in spans_by_bytes(tok, prompt + response, n_dummy)]
        assert row.keep.tolist() == [False, *touches, True]
        assert not row.noise.any()


@settings(max_examples=60, deadline=None)
@given(prompt=texts | code, response=texts | code)
def test_what_needs_no_characters_equals_what_asks_for_them(
    tokenizer, llama_tokenizer, prompt, response
):
    """One weight for all is counted in bytes, spans that say the same in characters."""
    for tok in (tokenizer, llama_tokenizer):
        spans = ((0, len(response), 0.3),)
        fast, slow = (encode_pair(tok, prompt, response, weight=w) for w in (0.3, spans))
        for name, ours, theirs in zip(fast._fields, fast, slow, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_straddling_token_belongs_to_the_response(tokenizer):
    ids, spans = encode_with_offsets(tokenizer, "def f")
    assert spans == [(0, 3), (3, 5)]
    row = encode_pair(tokenizer, "def ", "f")  # " f" is one token
    assert row.tokens.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert row.keep.tolist() == [False, False, True, True]


def test_text_is_supervised_throughout_and_noise_marks_overlaps(tokenizer):
    text = "def f():\n    return 漢 + 1\n"
    row = encode_text(tokenizer, text)
    assert row.tokens.tolist() == tokenizer.encode(text)
    assert row.keep.all()
    assert not row.noise.any()
    start = text.index("漢")
    noisy = encode_text(tokenizer, text, [(0, 1), (start, start + 1)])
    assert noisy.tokens.tolist() == row.tokens.tolist()
    _, spans = encode_with_offsets(tokenizer, text)
    expected = [b < 1 or (b < start + 1 and e > start) for b, e in spans]
    assert sum(expected) == 4  # "def" and the three bytes
    assert noisy.noise.tolist() == [False, *expected, False]


@settings(max_examples=60, deadline=None)
@given(prompt=code, text=code, data=st.data())
def test_noise_flags_every_overlap_and_nothing_else(tokenizer, llama_tokenizer, prompt, text, data):
    position = st.integers(0, len(text))
    drawn = data.draw(st.lists(st.tuples(position, position), max_size=3))
    noise = [tuple(sorted(span)) for span in drawn if span[0] != span[1]]
    for tok in (tokenizer, llama_tokenizer):
        _, spans = encode_with_offsets(tok, text)
        expected = [any(b < stop and e > start for start, stop in noise) for b, e in spans]
        assert encode_text(tok, text, noise).noise.tolist() == [False, *expected, False]
        _, spans = encode_with_offsets(tok, prompt + text)
        n = len(prompt)
        expected = [any(b < n + stop and e > n + start for start, stop in noise) for b, e in spans]
        assert encode_pair(tok, prompt, text, noise).noise.tolist() == [False, *expected, False]


@pytest.mark.parametrize(
    ("length", "sizes"), [(5, [5]), (8, [8]), (9, [8]), (10, [8, 2]), (17, [8, 8])]
)
def test_split_drops_only_a_last_piece_of_one_token(tokenizer, length, sizes):
    row = encode_text(tokenizer, "q" * (length - 2), [(0, 3)])
    assert len(row.tokens) == length
    pieces = list(split_row(row, 8))
    assert [len(piece.tokens) for piece in pieces] == sizes
    for whole, *parts in zip(row, *pieces, strict=True):
        np.testing.assert_array_equal(whole[: sum(sizes)], np.concatenate(parts))
