"""Rows that end leave the batch and waiting requests enter: nothing of a completion shows it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wmtp_modules.generation.generate import Request, generate_as_completed
from wmtp_modules.generation.self_speculative import Decoder

STOP = ("\n", "value")


@pytest.fixture
def many(prompts):
    """12 requests; long prompts before short ones, twins apart and side by side."""
    places = [2, 0, 4, 1, 1, 3, 2, 0, 3, 3, 4, 1]
    return [Request(prompts[place], seed) for seed, place in enumerate(places)]


@pytest.fixture
def spied(monkeypatch):
    """Rows of each forward (the prefill's not), and the slots whose prompts were run."""
    seen = {"rows": [], "prefilled": []}
    forward, prefill = Decoder._forward, Decoder._prefill

    def spied_forward(self):
        seen["rows"].append(len(self.rows))
        return forward(self)

    def spied_prefill(self, slots):
        seen["prefilled"].append([self.rows[slot].prompt for slot in slots])
        return prefill(self, slots)

    monkeypatch.setattr(Decoder, "_forward", spied_forward)
    monkeypatch.setattr(Decoder, "_prefill", spied_prefill)
    return seen


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
def test_a_completion_knows_nothing_of_slots(
    trained_model, many, decode, decoding, temperature, static_shapes, spied
):
    """Tokens, text and counts are those of each request alone, in the order of the requests."""
    settings = dict(decoding=decoding, temperature=temperature, stop=STOP, max_new_tokens=14)
    alone = [decode.one(trained_model, [request], **settings)[0] for request in many]
    assert len({g.forwards for g in alone}) > 2  # lengths are unlike
    assert {g.finish_reason for g in alone} == {"stop", "length"}
    settings |= dict(static_shapes=static_shapes)
    for batch_size in (1, 2, 5, 12, 50):
        spied["rows"].clear()
        assert decode.one(trained_model, many, batch_size=batch_size, **settings) == alone
        assert max(spied["rows"]) == min(batch_size, 12)
    backwards = decode.one(trained_model, many[::-1], batch_size=3, **settings)
    assert backwards == alone[::-1]


@pytest.mark.parametrize("static_shapes", [False, True])
def test_what_an_earlier_row_left_in_a_slot_is_never_seen(
    trained_model, many, decode, monkeypatch, static_shapes
):
    """Behind the prompt, whose keys are used again, a slot that is free holds large values."""
    expected = decode.one(trained_model, many, stop=STOP)
    leave = Decoder._leave

    def leave_dirt(self):
        ended = leave(self)
        for slot in range(len(self.rows), self._n_slots):
            for block in (*self.model.layers, *self.model.heads):
                first = len(self._prompts[slot] or ())
                block.attn.kv_cache.k_cache[slot, :, first:] = 50.0
                block.attn.kv_cache.v_cache[slot, :, first:] = 50.0
        return ended

    monkeypatch.setattr(Decoder, "_leave", leave_dirt)
    settings = dict(stop=STOP, static_shapes=static_shapes)
    assert decode.one(trained_model, many, batch_size=4, **settings) == expected


def test_slots_are_kept_busy(trained_model, many, decode, spied):
    """Fewer forwards than static batches take, each of which waits for its longest row."""
    made = decode.one(trained_model, many, batch_size=4, stop=STOP)
    refilled = len(spied["rows"])
    static = sum(max(g.forwards for g in made[i : i + 4]) for i in range(0, 12, 4))
    assert sum(spied["rows"]) == sum(g.forwards for g in made)
    assert refilled < 0.8 * static


def test_a_prompt_that_lies_in_a_slot_is_not_run_again(trained_model, prompts, decode, spied):
    twins = [Request(prompts[0], seed) for seed in range(7)]
    twins.append(Request(prompts[1], 7))
    settings = dict(temperature=1.0, stop=STOP)
    alone = [decode.one(trained_model, [twin], **settings)[0] for twin in twins]
    for batch_size in (1, 3, 8):
        spied["prefilled"].clear()
        assert decode.one(trained_model, twins, batch_size=batch_size, **settings) == alone
        runs = [prompt for batch in spied["prefilled"] for prompt in batch]
        assert runs == [prompts[0], prompts[1]]


@pytest.mark.parametrize("batch_size", [1, 2, 12])
def test_rows_may_end_at_their_prefill(
    random_model, many, tokenizer, decode, monkeypatch, batch_size
):
    """By length, all of them; by EOS, those whose first token it is."""
    plain = decode.one(random_model, many, "plain", max_new_tokens=10)
    one = decode.one(random_model, many, max_new_tokens=1, batch_size=batch_size)
    assert [g.tokens for g in one] == [g.tokens[:1] for g in plain]
    assert {(g.finish_reason, g.forwards) for g in one} == {("length", 0)}
    eos = plain[0].tokens[0]
    monkeypatch.setattr(tokenizer._spm_model, "eos_id", eos)
    ended = decode.one(random_model, many, max_new_tokens=10, batch_size=batch_size)
    assert [g.forwards == 0 for g in ended] == [g.tokens[0] == eos for g in plain]
    assert {g.forwards == 0 for g in ended} == {True, False}


def test_completions_arrive_as_they_end_and_caches_do_not_grow(trained_model, many, tokenizer):
    """Slots times the longest row; one slot where there is one request."""
    settings = dict(decoding="self_speculative", max_new_tokens=30, temperature=0.0, top_p=1.0)
    settings |= dict(top_k=0, stop=STOP, dtype=torch.float32)
    cache_len = max(len(request.prompt) for request in many) + 30
    for requests, slots in ((many, 3), (many[:1], 1)):
        made = generate_as_completed(trained_model, tokenizer, requests, batch_size=3, **settings)
        order, caches = [], set()
        for i, _ in made:
            order.append(i)
            cache = trained_model.heads[3].attn.kv_cache
            assert cache.k_cache.shape == (slots, 2, cache_len, 8)
            caches.add((cache.k_cache.data_ptr(), cache.v_cache.data_ptr()))
        assert sorted(order) == list(range(len(requests)))
        assert len(caches) == 1
        assert trained_model.heads[3].attn.kv_cache is None
    assert order == [0]


@pytest.mark.parametrize("how", ["fails", "is closed"])
def test_no_caches_are_left_when_decoding_ends_in_the_middle(
    random_model, many, tokenizer, monkeypatch, how
):
    random_model.train()
    made = generate_as_completed(
        random_model,
        tokenizer,
        many,
        batch_size=2,
        decoding="plain",
        max_new_tokens=5,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        stop=(),
        dtype=torch.float32,
    )
    next(made)
    assert random_model.heads[0].attn.kv_cache is not None
    if how == "fails":
        with torch.no_grad():
            random_model.output.proj.weight[7] = float("nan")
        with pytest.raises(ValueError, match="are not finite"):
            list(made)
    else:
        made.close()
    assert random_model.heads[0].attn.kv_cache is None
    assert random_model.training
    random_model(torch.tensor([[1, 2, 3]])).sum().backward()


class Operators(TorchDispatchMode):
    """Writes down each operator with the shapes that it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        self.seen.append((func.overloadpacket.__name__, *shapes))
        return func(*args, **kwargs or {})


@pytest.fixture
def operators(monkeypatch):
    """The operators of each forward."""
    forwards, forward = [], Decoder._forward

    def counted(self):
        with Operators() as operators:
            table = forward(self)
        forwards.append(operators.seen)
        return table

    monkeypatch.setattr(Decoder, "_forward", counted)
    return forwards


@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
def test_forwards_of_static_shapes_are_all_the_same(
    trained_model, many, decode, decoding, operators
):
    """What recording one as a graph needs: same operators, same shapes, no wait for a value."""
    settings = dict(decoding=decoding, stop=STOP, temperature=0.9, top_k=5, batch_size=4)
    expected = decode.one(trained_model, many, **settings)
    assert any(seen != operators[0] for seen in operators)
    operators.clear()
    assert decode.one(trained_model, many, static_shapes=True, **settings) == expected
    assert len(operators) > 5
    assert all(seen == operators[0] for seen in operators)
    waits = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}
    assert not waits & {name for name, *_ in operators[0]}


def test_operators_of_a_forward(trained_model, many, decode, operators):
    """Of 3 and of 6 blocks: 201 and 387, and 30 a block more with torchtune's rotary embeddings."""
    decode.one(trained_model, many[:1], "plain", max_new_tokens=5)
    decode.one(trained_model, many[:1], max_new_tokens=5)
    plain, fast = ([name for name, *_ in seen] for seen in (operators[0], operators[-1]))
    assert len(plain) < 220
    assert len(fast) < 410
    # A mask where one query of several must not see the next key, and only there.
    assert (plain.count("masked_fill_"), fast.count("masked_fill_")) == (0, 1)
