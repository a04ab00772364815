import pytest
import torch

from wmtp_modules.generation.generate import Request
from wmtp_modules.generation.measure import compare_decodings, measure_decoding
from wmtp_modules.models import mtp_llama2

SETTINGS = dict(
    batch_size=2, max_new_tokens=30, temperature=0.0, top_p=1.0, top_k=0, stop=(), repeats=2
)


def bf16(model):
    copy = mtp_llama2(**model.args)
    copy.load_state_dict(model.state_dict())
    return copy.bfloat16()


def test_equal_decodings(trained_model, requests, decode):
    plain, fast = decode.both(trained_model, requests)
    assert compare_decodings(trained_model, requests, plain, fast) == {
        "identical": True,
        "differences": [],
    }


def test_a_difference_comes_with_its_logit_gap(trained_model, requests, decode):
    """The gap is taken behind the tokens that both share."""
    plain, fast = decode.both(trained_model, requests)
    fast[2].tokens[4] = other = (plain[2].tokens[4] + 1) % 512
    fast[2].tokens[6] = other
    fast[1].tokens = fast[1].tokens[:-1]
    context = torch.tensor([[*requests[2].prompt, *plain[2].tokens[:4]]])
    with torch.no_grad():
        logits = trained_model(context)[0, -1, 0]
    right = plain[2].tokens[4]
    found = compare_decodings(trained_model, requests, plain, fast)
    assert not found["identical"]
    last = len(plain[1].tokens) - 1
    assert found["differences"] == [
        {
            "request": 1,
            "position": last,
            "plain": plain[1].tokens[last],
            "self_speculative": None,
            "logit_gap": None,
        },
        {
            "request": 2,
            "position": 4,
            "plain": right,
            "self_speculative": other,
            "logit_gap": pytest.approx((logits[right] - logits[other]).item()),
        },
    ]


def test_in_bf16_every_difference_is_a_near_tie(random_model, requests, decode):
    """Random weights, many rows: hidden states in bf16 depend on how many are computed at once."""
    model = bf16(random_model)
    many = [Request((1, *range(3 + i, 9 + i)), i) for i in range(40)]
    plain, fast = decode.both(model, many, dtype=torch.bfloat16)
    found = compare_decodings(model, many, plain, fast)
    assert found["identical"] == (not found["differences"])
    for difference in found["differences"]:
        assert difference["logit_gap"] < 0.05


def test_measured_figures(trained_model, tokenizer, requests, decode):
    report = measure_decoding(trained_model, tokenizer, requests, dtype=torch.float32, **SETTINGS)
    assert report["identical"]
    assert report["differences"] == []
    fast = decode.one(trained_model, requests, max_new_tokens=30)
    forwards = sum(g.forwards for g in fast)
    assert report["tokens_per_forward"] == sum(len(g.tokens) - 1 for g in fast) / forwards
    assert report["acceptance_per_head"] == [
        sum(g.accepted[k] for g in fast) / forwards for k in range(3)
    ]
    assert report["tokens_per_forward"] == pytest.approx(1 + sum(report["acceptance_per_head"]))
    n_tokens = sum(len(g.tokens) for g in fast)
    for name in ("plain", "self_speculative"):
        seconds = report[f"{name}_seconds"]
        assert len(seconds) == 2
        assert report[f"{name}_tokens_per_s"] == pytest.approx(n_tokens / (sum(seconds) / 2))
    speeds = report["self_speculative_tokens_per_s"], report["plain_tokens_per_s"]
    assert report["speedup"] == speeds[0] / speeds[1]


def test_one_token_has_no_forward_to_measure(trained_model, tokenizer, requests):
    settings = SETTINGS | {"max_new_tokens": 1, "repeats": 1}
    report = measure_decoding(trained_model, tokenizer, requests, dtype=torch.float32, **settings)
    assert report["tokens_per_forward"] is None
    assert report["acceptance_per_head"] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(requests=[]), "no requests to measure"),
        (dict(batch_size=0), "batch_size and repeats must be at least 1, got 0 and 2"),
        (dict(repeats=0), "batch_size and repeats must be at least 1, got 2 and 0"),
    ],
)
def test_errors(trained_model, tokenizer, changes, message):
    arguments = SETTINGS | {"requests": [Request((1,), 0)], "dtype": torch.float32} | changes
    with pytest.raises(ValueError, match=message):
        measure_decoding(trained_model, tokenizer, **arguments)
