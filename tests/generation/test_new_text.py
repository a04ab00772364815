import random

import pytest
import sentencepiece as spm
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.generation.new_text import NewText

PROMPT = 'def double(x):\n    """Return twice x."""\n'
COMPLETION = "    return  x * 2  # µ2 €\n\n\nclass A:\n    pass\n"


@pytest.fixture(scope="module", params=["exact", "llama2"])
def tokenizer(request, tiny_tokenizer_path, tmp_path_factory):
    """Without and with the space that Llama-2's tokenizer puts before a text."""
    if request.param == "exact":
        return Llama2Tokenizer(str(tiny_tokenizer_path))
    folder = tmp_path_factory.mktemp("llama2")
    spm.SentencePieceTrainer.train(
        input=str(tiny_tokenizer_path.with_name("corpus.txt")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    return Llama2Tokenizer(str(folder / "tokenizer.model"))


def split(tokenizer, prompt=PROMPT, completion=COMPLETION):
    """Ids of prompt and completion, encoded as one text."""
    ids = tokenizer.encode(prompt + completion, add_bos=True, add_eos=False)
    prompt_ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    assert ids[: len(prompt_ids)] == prompt_ids
    return prompt_ids, ids[len(prompt_ids) :]


def push_all(new_text, tokens):
    """How many tokens were taken when a stop string was complete, None if there was none."""
    return next((i for i, token in enumerate(tokens, 1) if new_text.push(token)), None)


@pytest.mark.parametrize("stop", [(), ("\nnever",)])
def test_indentation_and_characters_are_exact(tokenizer, stop):
    prompt, new = split(tokenizer)
    new_text = NewText(tokenizer, prompt, stop)
    assert push_all(new_text, new) is None
    assert new_text.text == COMPLETION


@pytest.mark.parametrize("stop", [(), ("\nnever",)])
def test_a_text_that_begins_with_the_first_new_token(tokenizer, stop):
    """Behind BOS alone, SentencePiece's own first space is no text."""
    prompt, new = split(tokenizer, prompt="", completion="def f(x):\n")
    assert prompt == [tokenizer.bos_id]
    new_text = NewText(tokenizer, prompt, stop)
    push_all(new_text, new)
    assert new_text.text == "def f(x):\n"


def test_token_by_token_equals_all_at_once(tokenizer):
    """Random ids: broken characters, control tokens, unknown tokens, single spaces."""
    rng = random.Random(0)
    prompt = tokenizer.encode(PROMPT, add_bos=True, add_eos=False)
    for _ in range(200):
        tokens = [
            rng.choice([rng.randrange(512), rng.randrange(3), rng.randrange(3, 259)])
            for _ in range(rng.randrange(1, 30))
        ]
        new_text = NewText(tokenizer, prompt, ("no such text",))
        push_all(new_text, tokens)
        whole = tokenizer.decode(prompt + tokens)
        assert new_text.text == whole[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("\nclass",), "    return  x * 2  # µ2 €\n\n"),
        (("class A:\n    pass",), "    return  x * 2  # µ2 €\n\n\n"),
        (("€",), "    return  x * 2  # µ2 "),
        (("\nclass", " x"), "    return "),
        (("  ",), ""),
        (("turn", "return"), "    "),
        (("2  # µ2 €\n\n\nclas", "nothing"), "    return  x * "),
    ],
)
def test_the_text_ends_before_the_first_stop_string(tokenizer, stop, text):
    prompt, new = split(tokenizer)
    new_text = NewText(tokenizer, prompt, stop)
    taken = push_all(new_text, new)
    assert new_text.text == text
    # The token that completes it is the first whose text holds it.
    before = len(tokenizer.decode(prompt))
    holds = [
        any(s in tokenizer.decode(prompt + new[:i])[before:] for s in stop)
        for i in range(1, len(new) + 1)
    ]
    assert taken == holds.index(True) + 1


def test_what_the_prompt_ends_with_is_no_part_of_a_stop_string(tokenizer):
    prompt, new = split(tokenizer)
    new_text = NewText(tokenizer, prompt, ('"\n    return',))
    assert push_all(new_text, new) is None


def test_a_long_text_costs_no_more_per_token(tokenizer):
    """Counted, not timed: the tokens that are decoded grow with the length, not its square."""
    decoded = 0

    class Counting:
        def decode(self, ids):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids)

    new = tokenizer.encode(COMPLETION * 60, add_bos=False, add_eos=False)
    push_all(NewText(Counting(), [1], ("no such text",)), new)
    assert decoded < 8 * len(new)
