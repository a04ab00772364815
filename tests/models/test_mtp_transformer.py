import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2, mtp_llama2_7b, mtp_sheared_llama_1_3b


def parameters(builder, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in builder(**kwargs).parameters())


def test_parameter_counts_of_the_released_shapes():
    assert parameters(mtp_llama2_7b) == 6_738_415_616
    # 32 blocks whatever the split between trunk and heads.
    assert parameters(mtp_llama2_7b, n_future_tokens=1) == 6_738_415_616
    assert parameters(mtp_sheared_llama_1_3b) == 1_345_423_360


@pytest.fixture
def model(tiny_model_args):
    torch.manual_seed(0)
    return mtp_llama2(**tiny_model_args)


@pytest.fixture
def tokens():
    return torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(1))


def labels_of(tokens, n_future_tokens=4):
    keep = torch.ones_like(tokens, dtype=torch.bool)
    return mtp_labels(tokens, keep, torch.zeros_like(tokens), n_future_tokens)


def test_losses_are_the_cross_entropy_of_the_logits(model, tokens):
    labels = labels_of(tokens)
    expected = F.cross_entropy(model(tokens).flatten(0, 2), labels.flatten(), reduction="none")
    torch.testing.assert_close(model(tokens, labels).flatten(), expected)


def test_logits_and_losses_of_a_bf16_model_are_those_of_an_fp64_product(model, tokens):
    """What is drawn, trained, scored and judged comes from the same logits."""
    model, labels = model.bfloat16(), labels_of(tokens)
    normed = []
    model.output.norm.register_forward_hook(lambda _m, _i, out: normed.append(out))
    with torch.no_grad():
        logits, losses = model(tokens), model(tokens, labels)
    assert normed[0].dtype == torch.bfloat16
    want = normed[0].double() @ model.output.proj.weight.double().T
    assert logits.dtype == losses.dtype == torch.float32
    assert (logits - want).abs().max() < 1e-5
    want = F.cross_entropy(want.flatten(0, 2), labels.flatten(), reduction="none")
    assert (losses.flatten() - want).abs().max() < 1e-5


def test_folded_weights_equal_weights_applied_afterwards(model, tokens):
    labels = labels_of(tokens)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    (model(tokens, labels) * weights).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total, losses = model(tokens, labels, token_weights_BTK=weights)
    assert not losses.requires_grad
    total.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_heads_share_the_trunk_and_nothing_else(model, tokens):
    """Changing one head's block changes that head's logits only; the trunk changes all."""
    before = model(tokens)
    with torch.no_grad():
        model.heads[2].mlp.w1.weight.add_(1.0)
    changed = (model(tokens) - before).abs().amax(dim=(0, 1, 3)) > 0
    assert changed.tolist() == [False, False, True, False]


def test_no_head_sees_the_future(model, tokens):
    before = model(tokens)
    tokens = tokens.clone()
    tokens[:, 10] = (tokens[:, 10] + 1) % 512
    after = model(tokens)
    torch.testing.assert_close(after[:, :10], before[:, :10])
    assert ((after - before).abs().amax(dim=(0, 3))[10] > 0).all()


def cached(model, tokens, input_pos):
    mask = model.place_in_caches(input_pos, model.cache_len)
    return model(tokens, mask=mask, input_pos=input_pos)


def test_cached_decoding_with_rows_at_different_positions(model, tokens):
    """Rows advance by 3 and 7, one is rolled back and rewritten, heads included."""
    full = model(tokens)
    position = torch.arange(20)
    model.setup_caches(2, torch.float32, cache_len=32)

    def step(starts, length):
        pos = torch.stack([position[s : s + length] for s in starts])
        return cached(model, tokens.gather(1, pos), pos), pos

    for starts, length in [((0, 0), 3), ((3, 3), 4), ((3, 7), 5), ((8, 12), 2), ((6, 14), 6)]:
        logits, pos = step(starts, length)
        for row in range(2):
            torch.testing.assert_close(logits[row], full[row, pos[row]], rtol=1e-4, atol=1e-5)
    model.delete_caches()
    torch.testing.assert_close(model(tokens), full)


def test_rolled_back_keys_are_never_seen(model, tokens):
    full = model(tokens)
    model.setup_caches(2, torch.float32, cache_len=32)
    position = torch.arange(20).expand(2, -1)
    wrong = (tokens + 7) % 512
    cached(model, tokens[:, :5], position[:, :5])
    cached(model, wrong[:, 5:9], position[:, 5:9])  # rejected drafts
    logits = cached(model, tokens[:, 5:7], position[:, 5:7])
    torch.testing.assert_close(logits, full[:, 5:7], rtol=1e-4, atol=1e-5)


def test_cache_rows_may_be_copied(model, tokens):
    """Row 0 goes on as row 1 did, up to the end of the copy; without it, it would not."""
    full = model(tokens)
    position = torch.arange(20).expand(2, -1)
    model.setup_caches(2, torch.float32, cache_len=32)
    cached(model, tokens[:, :8], position[:, :8])
    model.copy_cache_rows(torch.tensor([1]), torch.tensor([0]), 8)
    rows = torch.tensor([1, 1])
    logits = cached(model, tokens[rows, 8:12], position[:, 8:12])
    torch.testing.assert_close(logits, full[rows, 8:12], rtol=1e-4, atol=1e-5)


def test_whole_texts_go_to_any_rows_without_a_mask(model, tokens):
    """Row 2 of the caches gets text 0, row 0 text 1; the forward asks for causal attention."""
    full = model(tokens)
    position = torch.arange(20).expand(2, -1)
    model.setup_caches(3, torch.float32, cache_len=32)
    model.place_prompts_in_caches(torch.tensor([2, 0]), 8)
    torch.testing.assert_close(model(tokens[:, :8]), full[:, :8], rtol=1e-4, atol=1e-5)
    model.copy_cache_rows(torch.tensor([2]), torch.tensor([1]), 8)
    rows = torch.tensor([1, 0])
    logits = cached(model, tokens[rows, 8:12], position[:, 8:12])
    torch.testing.assert_close(logits, full[rows, 8:12], rtol=1e-4, atol=1e-5)
    model.delete_caches()
    torch.testing.assert_close(model(tokens), full)


def test_blocks_look_at_the_cache_up_to_its_end_only(model, tokens):
    """Trunk and a head by hand; what lies behind ``end`` may even be NaN."""
    full = model(tokens)
    position = torch.arange(9).expand(2, -1)
    model.setup_caches(2, torch.float32, cache_len=32)
    for block in (*model.layers, *model.heads):
        block.attn.kv_cache.v_cache[:, :, 9:] = float("nan")
    mask = model.place_in_caches(position, 9)
    hidden = model.trunk(tokens[:, :9], mask=mask, input_pos=position)
    logits = model.output(model.heads[2](hidden, mask=mask, input_pos=position))
    torch.testing.assert_close(logits, full[:, :9, 2], rtol=1e-4, atol=1e-5)


def test_errors(model, tiny_model_args):
    with pytest.raises(ValueError, match="exceeds the model's max_seq_len 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="n_future_tokens 6 must be at least 1 and below"):
        mtp_llama2(**tiny_model_args | {"n_future_tokens": 6})
    with pytest.raises(ValueError, match="embed_dim 30 must be a multiple"):
        mtp_llama2(**tiny_model_args | {"embed_dim": 30})


def test_one_head_is_an_ordinary_llama(tiny_model_args):
    """Same weights in torchtune's own Llama-2 give the same logits."""
    from torchtune.models.llama2 import llama2

    args = tiny_model_args | {"n_future_tokens": 1}
    ours = mtp_llama2(**args)
    args.pop("n_future_tokens")
    theirs = llama2(**args)
    state = ours.state_dict()
    last = args["num_layers"] - 1
    renamed = {
        k.replace("heads.0.", f"layers.{last}.")
        .replace("output.norm.", "norm.")
        .replace("output.proj.", "output."): v
        for k, v in state.items()
    }
    assert isinstance(theirs, nn.Module)
    theirs.load_state_dict(renamed)
    x = torch.randint(512, (2, 9))
    torch.testing.assert_close(ours(x)[:, :, 0], theirs(x))
