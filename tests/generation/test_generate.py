import pytest
import torch

from wmtp_modules.generation.generate import Request
from wmtp_modules.generation.self_speculative import Decoder, count_kept
from wmtp_modules.models import mtp_llama2


def tokens_of(generations):
    return [generation.tokens for generation in generations]


def uncached(model, request, n):
    """Greedy decoding by one whole forward for each token."""
    tokens = list(request.prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(model(torch.tensor([tokens]))[0, -1, 0].argmax().item())
    return tokens[len(request.prompt) :]


def check_counts(generations, n_heads=4):
    for g in generations:
        assert len(g.tokens) == 1 + g.forwards + sum(g.accepted)
        assert sorted(g.accepted, reverse=True) == g.accepted


@pytest.fixture(params=["random", "trained"])
def model(request, random_model, trained_model):
    return random_model if request.param == "random" else trained_model


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.8), dict(temperature=1.0, top_p=0.9)])
def test_self_speculative_equals_plain_token_for_token(model, requests, decode, sampling):
    plain, fast = decode.both(model, requests, **sampling)
    assert tokens_of(fast) == tokens_of(plain)
    assert [g.finish_reason for g in fast] == [g.finish_reason for g in plain]
    assert [g.text for g in fast] == [g.text for g in plain]
    check_counts(fast)
    for g in plain:
        assert (g.forwards, g.accepted) == (len(g.tokens) - 1, [0] * 3)


def test_training_makes_forwards_fewer(trained_model, requests, decode):
    """The other tests say little where no draft is ever kept."""
    fast = decode.one(trained_model, requests)
    assert sum(len(g.tokens) - 1 for g in fast) > 1.5 * sum(g.forwards for g in fast)


def test_cached_decoding_equals_whole_forwards(model, requests, decode):
    plain, fast = decode.both(model, requests, max_new_tokens=20, stop=())
    for request, one, other in zip(requests, plain, fast, strict=True):
        expected = uncached(model, request, len(one.tokens))
        assert one.tokens == other.tokens == expected


@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_depends_on_its_request_only(model, requests, decode, decoding, temperature):
    """Not on batch size, order, other prompts or a twin with the same prompt."""
    settings = dict(decoding=decoding, temperature=temperature, max_new_tokens=24)
    alone = [decode.one(model, [request], **settings)[0].tokens for request in requests]
    assert tokens_of(decode.one(model, requests, **settings)) == alone
    assert tokens_of(decode.one(model, requests[::-1], **settings)) == alone[::-1]
    twins = [requests[2], Request(requests[2].prompt, 99), requests[0], requests[2]]
    first, other, second, third = tokens_of(decode.one(model, twins, **settings))
    assert (first, second, third) == (alone[2], alone[0], alone[2])
    assert (other == first) == (temperature == 0)


def test_the_heads_guess_as_they_do_in_whole_forwards(model, requests, decode):
    """A wrong guess changes no token, so only the counts show that the guesses are the heads'."""
    plain, fast = decode.both(model, requests)
    for request, g, result in zip(requests, plain, fast, strict=True):
        with torch.no_grad():
            logits_TKV = model(torch.tensor([[*request.prompt, *g.tokens]]))[0]
        says_TK = logits_TKV[len(request.prompt) - 1 :].argmax(-1).tolist()  # before new token T
        forwards, accepted, done = 0, [0, 0, 0], 1
        while done < len(g.tokens):
            forwards += 1
            guesses = zip(says_TK[done - 1][1:], g.tokens[done:-1], strict=False)
            right = [guess == token for guess, token in guesses]
            kept = [*right, False].index(False)
            for k in range(kept):
                accepted[k] += 1
            done += kept + 1
        assert (result.forwards, result.accepted) == (forwards, accepted)


def all_kept(batch, guess):
    return guess


def none_kept(batch, guess):
    return (guess + 1) % 512


def n_right(prompt, forward):
    return (forward + 1) * len(prompt) % 4


def some_kept(batch, guess):
    """The row's number of right guesses changes from forward to forward and from row to row."""
    right = torch.tensor([n_right(row.prompt, row.forwards) for row in batch.rows])
    wrong = torch.arange(3)[None, :] >= right[:, None]
    return torch.where(wrong, (guess + 1) % 512, guess)


def right_behind_a_wrong_one(batch, guess):
    """Kept guesses must be consecutive: one behind a wrong one is not looked at."""
    guess = guess.clone()
    guess[:, 0] = (guess[:, 0] + 1) % 512
    return guess


@pytest.fixture
def fake_drafter(monkeypatch):
    """Make guesses from the tokens that plain decoding gave."""

    def install(fake, plain, requests):
        known = {r.prompt: g.tokens for r, g in zip(requests, plain, strict=True)}

        def draft(self, logits_BKV):
            guess = []
            for row, drawn in zip(self.rows, self._drawn_B.tolist(), strict=False):
                rest = known[row.prompt][drawn:][:3]
                guess.append(rest + [0] * (3 - len(rest)))
            return fake(self, torch.tensor(guess))

        monkeypatch.setattr(Decoder, "draft", draft)

    return install


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "fake", [all_kept, none_kept, some_kept, right_behind_a_wrong_one], ids=lambda f: f.__name__
)
def test_fake_drafters(random_model, requests, decode, fake_drafter, fake, temperature):
    """40 tokens: the first from the prefill, then forwards of 1 to 4."""
    settings = dict(temperature=temperature, max_new_tokens=40)
    plain = decode.one(random_model, requests, "plain", **settings)
    fake_drafter(fake, plain, requests)
    fast = decode.one(random_model, requests, **settings)
    assert tokens_of(fast) == tokens_of(plain)
    check_counts(fast)
    for request, g in zip(requests, fast, strict=True):
        later = len(g.tokens) - 1
        if fake is all_kept:
            assert g.forwards == -(-later // 4)
        elif fake is some_kept:
            runs = [1 + n_right(request.prompt, forward) for forward in range(g.forwards)]
            assert sum(runs[:-1]) < later <= sum(runs)
        else:
            assert (g.forwards, g.accepted) == (later, [0, 0, 0])
    if fake is some_kept:
        assert len({g.forwards for g in fast}) > 1


def test_count_kept_stops_at_the_first_other_draw():
    fed = torch.tensor([[9, 1, 2, 3]] * 5)
    draws = torch.tensor([[1, 2, 3, 7], [1, 2, 7, 3], [1, 7, 3, 3], [7, 2, 3, 3], [7, 7, 7, 7]])
    assert count_kept(fed, draws).tolist() == [3, 2, 1, 0, 0]
    assert count_kept(fed[:, :1], draws[:, :1]).tolist() == [0] * 5


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6])
def test_the_limit_may_fall_anywhere_in_a_run(
    random_model, requests, decode, fake_drafter, max_new_tokens
):
    plain = decode.one(random_model, requests, "plain", max_new_tokens=10)
    fake_drafter(all_kept, plain, requests)
    fast = decode.one(random_model, requests, max_new_tokens=max_new_tokens)
    assert tokens_of(fast) == [g.tokens[:max_new_tokens] for g in plain]
    assert {g.finish_reason for g in fast} == {"length"}
    check_counts(fast)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 8])
def test_eos_may_fall_anywhere_in_a_run(
    random_model, tokenizer, requests, decode, fake_drafter, at, monkeypatch
):
    """What the model says at one place becomes the EOS id; right guesses behind it are void."""
    plain = decode.one(random_model, requests[:1], "plain", max_new_tokens=20)
    tokens = plain[0].tokens
    fake_drafter(all_kept, plain, requests[:1])
    eos_id = tokens[at]
    monkeypatch.setattr(tokenizer._spm_model, "eos_id", eos_id)
    fast = decode.one(random_model, requests[:1], max_new_tokens=20)[0]
    end = tokens.index(eos_id) + 1
    assert fast.tokens == tokens[:end]
    assert fast.finish_reason == "eos"
    prompt = list(requests[0].prompt)
    before = tokenizer.decode(prompt)
    assert fast.text == tokenizer.decode(prompt + tokens[: end - 1])[len(before) :]
    check_counts([fast])


def test_stop_strings_may_fall_anywhere_in_a_run(trained_model, requests, decode):
    """Every piece of text of 1, 4 and 9 characters, across tokens and runs, in both decodings."""
    text = decode.one(trained_model, requests[:1], "plain")[0].text
    assert len(text) > 60
    for size in (1, 4, 9):
        for i in range(0, 50, 7):
            stop = (text[i : i + size], "never said")
            plain, fast = decode.both(trained_model, requests[:1], stop=stop)
            assert tokens_of(plain) == tokens_of(fast)
            assert plain[0].text == fast[0].text == text[: text.index(stop[0])]
            assert plain[0].finish_reason == fast[0].finish_reason == "stop"
            check_counts(fast)


def test_rows_end_at_different_times_and_leave_the_others_alone(trained_model, requests, decode):
    alone = [decode.one(trained_model, [r], stop=("\n",))[0] for r in requests]
    together = decode.one(trained_model, requests, stop=("\n",))
    assert together == alone
    assert len({g.forwards for g in alone}) > 1


def test_a_prompt_may_fill_the_model_to_its_last_position(random_model, decode):
    """Guesses reach behind the last position: they are fed nowhere and change nothing."""
    requests = [Request(tuple(range(5, 5 + n)), n) for n in (108, 100)]
    plain, fast = decode.both(random_model, requests, max_new_tokens=20)
    for request, one, other in zip(requests, plain, fast, strict=True):
        assert one.tokens == other.tokens == uncached(random_model, request, len(one.tokens))


def test_guesses_that_reach_behind_the_last_position(random_model, decode, fake_drafter):
    requests = [Request(tuple(range(5, 113)), 0)]
    plain = decode.one(random_model, requests, "plain", max_new_tokens=20)
    fake_drafter(some_kept, plain, requests)
    assert tokens_of(decode.one(random_model, requests, max_new_tokens=20)) == tokens_of(plain)


def test_no_requests(random_model, decode):
    assert decode.one(random_model, []) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(random_model, requests, decode, monkeypatch, fails):
    random_model.train()
    modules, attn = list(random_model.named_modules()), random_model.heads[-1].attn
    call = attn._attention_call.__qualname__
    if fails:
        monkeypatch.setattr(Decoder, "draft", lambda self, logits_BKV: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode.one(random_model, requests)
    else:
        decode.one(random_model, requests)
    assert attn.kv_cache is None
    assert random_model.training
    assert list(random_model.named_modules()) == modules
    assert attn._attention_call.__qualname__ == call
    random_model(torch.tensor([[1, 2, 3]])).sum().backward()


def test_plain_decoding_runs_head_0_only(random_model, requests, decode, monkeypatch):
    for head in random_model.heads[1:]:
        monkeypatch.setattr(head, "forward", lambda *_, **__: 1 / 0)
    decode.one(random_model, requests, "plain")
    with pytest.raises(ZeroDivisionError):
        decode.one(random_model, requests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(decoding="fast"), "decoding must be one of plain, self_speculative, got 'fast'"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(stop="\n"), r"stop must be a tuple of non-empty strings, got '\\n'"),
        (dict(stop=("a", "")), "tuple of non-empty strings"),
        (dict(dtype=torch.bfloat16), "dtype is torch.bfloat16, but the model's parameters are"),
        (dict(temperature=-1.0), "temperature must be"),
        (dict(max_new_tokens=126), r"request 0 has 3 tokens, .* max_new_tokens 126 .*_len 128"),
        (dict(requests=[Request((1,), 0), Request((), 0)]), "request 1 is empty"),
        (dict(requests=[Request((1, 512), 0)]), r"request 0 has ids outside .* vocabulary of 512"),
        (dict(requests=[Request((1, -1), 0)]), "request 0 has ids outside"),
    ],
)
def test_errors(random_model, decode, changes, message):
    changes = {"requests": [Request((1, 2, 3), 0)]} | changes
    with pytest.raises(ValueError, match=message):
        decode.one(random_model, **changes)


def test_a_model_with_one_head_cannot_draft(tiny_model_args, decode):
    model = mtp_llama2(**tiny_model_args | {"n_future_tokens": 1})
    request = [Request((1, 2, 3), 0)]
    with pytest.raises(ValueError, match="this model has only one: set decoding to plain"):
        decode.one(model, request)
    assert decode.one(model, request, "plain")[0].accepted == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_the_run(random_model, requests, decode, temperature):
    with torch.no_grad():
        random_model.output.proj.weight[7] = float("nan")
    with pytest.raises(ValueError, match=r"logits after token \d+ are not finite"):
        decode.one(random_model, requests, temperature=temperature)
