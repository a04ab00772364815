"""A folder of ``--to hf-mtp``: transformers loads all heads, trains them, and generates with them
what it generates without."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules import convert
from wmtp_modules.checkpoints import write_hf as export
from wmtp_modules.checkpoints.read import Checkpoint, load_into, model_args_from_folder
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.generation.generate import Request, generate
from wmtp_modules.loss.mtp_loss import mtp_labels
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.model_builders import LLAMA3_SCALING
from wmtp_modules.parallel.sharding import init_weights_

CYCLE = range(300, 312)  # the tokens that the model has learned to say, and in which order
ARGS = dict(
    vocab_size=512,
    num_layers=6,
    n_future_tokens=4,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    max_seq_len=256,
    intermediate_dim=64,
    rope_base=500.0,
    rope_scaling=LLAMA3_SCALING | {"original_max_position_embeddings": 16},
    norm_eps=1e-4,
)


def cycles(n, T):
    """Rows that go round, now and then jump, and seldom end."""
    ids = torch.randint(len(CYCLE), (n,))
    rows = []
    for _ in range(T):
        ids = torch.where(torch.rand(n) < 0.15, torch.randint(len(CYCLE), (n,)), ids + 1)
        rows.append(torch.where(torch.rand(n) < 0.05, 2, CYCLE[0] + ids % len(CYCLE)))
    return torch.stack(rows, dim=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer_path):
    """A folder with ``meta``, ``hf-mtp`` and ``hf`` of one model, whose heads often agree."""
    folder = tmp_path_factory.mktemp("hf_mtp")
    model = mtp_llama2(**ARGS)
    init_weights_(model, 0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    everything = torch.ones(16, 32, dtype=torch.bool)
    for _ in range(60):
        tokens_BT = cycles(16, 32)
        labels_BTK = mtp_labels(tokens_BT, everything, torch.zeros_like(tokens_BT), 4)
        (model(tokens_BT, labels_BTK) * (labels_BTK >= 0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):  # norms of ones would hide one in the wrong place
                parameter += 0.05 * torch.randn(parameter.shape)
    save_meta(model, folder / "meta", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    for to in ("hf-mtp", "hf"):
        assert convert.main([str(folder / "meta"), str(folder / to), "--to", to]) == 0
    return folder, model


@pytest.fixture(scope="module")
def loaded(made):
    """load(name, **how): a model of transformers, from one of the folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers", reason="no reward extra is installed")
        cache = str(made[0] / "modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)

        def load(name, **how):
            path = name if "/" in str(name) else made[0] / name
            how = {"trust_remote_code": True} | how
            return transformers.AutoModelForCausalLM.from_pretrained(path, **how).eval()

        yield load


@pytest.fixture(scope="module")
def mtp(loaded):
    return loaded("hf-mtp")


@pytest.fixture(scope="module")
def plain(loaded):
    return loaded("hf")


@pytest.fixture(scope="module")
def tokenizer(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made[0] / "hf-mtp", padding_side="left", pad_token="<unk>")


def prompts(*lengths, seed=0):
    """ids and mask, padded on the left."""
    generator, T = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(CYCLE[0], CYCLE[-1] + 1, (len(lengths), T), generator=generator)
    mask = torch.stack([(torch.arange(T) >= T - n).long() for n in lengths])
    return dict(input_ids=ids.where(mask == 1, 1), attention_mask=mask, pad_token_id=1)


# -------------------------------------------------------------------------------- logits


def test_logits_of_every_head(made, mtp, plain):
    tokens_BT = torch.randint(3, 512, (2, 40))
    with torch.no_grad():
        ours_BTKV = made[1](tokens_BT)
        assert ours_BTKV.std() > 0.5
        theirs_BTKV = mtp.mtp_logits(tokens_BT)
        torch.testing.assert_close(theirs_BTKV, ours_BTKV, atol=2e-5, rtol=2e-5)
        # One head in the place of another would be seen.
        assert (ours_BTKV[:, :, 1:] - ours_BTKV[:, :, :-1]).abs().amax((0, 1, 3)).min() > 0.5
        head_0 = plain(tokens_BT).logits
        assert torch.equal(mtp(tokens_BT).logits, head_0)
        torch.testing.assert_close(head_0, ours_BTKV[:, :, 0], atol=2e-5, rtol=2e-5)


def test_a_plain_reader_gets_trunk_and_head_0(loaded, plain):
    tokens_BT = torch.randint(3, 512, (2, 12))
    other = loaded("hf-mtp", trust_remote_code=False)
    assert type(other).__name__ == "LlamaForCausalLM"
    assert torch.equal(other(tokens_BT).logits, plain(tokens_BT).logits)


# -------------------------------------------------------------------------------- losses


def test_losses_are_ours(made, mtp):
    """Label shift, ignored labels, and documents that begin inside a row."""
    tokens_BT = torch.randint(3, 512, (2, 24))
    keep_BT = torch.rand(2, 24) > 0.3
    keep_BT[:, -1] = True
    doc_BT = torch.tensor([[0] * 10 + [1] * 14, [0] * 17 + [1] * 7])
    pos_BT = torch.cat([torch.arange(n) for n in (10, 14, 17, 7)]).view(2, 24)
    same = (doc_BT[:, :, None] == doc_BT[:, None]) & torch.ones(24, 24).tril().bool()
    labels_BT = tokens_BT.masked_fill(~keep_BT, -100)
    model = made[1]
    for packed in (False, True):
        doc = doc_BT if packed else torch.zeros_like(doc_BT)
        labels_BTK = mtp_labels(tokens_BT, keep_BT, doc, 4)
        how = dict(mask=same, input_pos=pos_BT) if packed else {}
        losses_BTK, kept_BTK = model(tokens_BT, labels_BTK, **how), labels_BTK >= 0
        how = dict(position_ids=pos_BT) if packed else {}
        out = mtp(tokens_BT, labels=labels_BT, **how)
        sums_K, n_K = (losses_BTK * kept_BTK).sum((0, 1)), kept_BTK.sum((0, 1))
        torch.testing.assert_close(out.losses, (sums_K / n_K).detach())
        torch.testing.assert_close(out.loss, (sums_K.sum() / n_K.sum()))
        summed = mtp(tokens_BT, labels=labels_BT, num_items_in_batch=50, **how).loss
        torch.testing.assert_close(summed, sums_K.sum() / 4 / 50)
        assert torch.equal(out.logits, mtp(tokens_BT, use_cache=False, **how).logits)
        assert not torch.allclose(out.losses[0], out.losses[1])
    few = mtp(tokens_BT[:, :3], labels=tokens_BT[:, :3])
    assert few.losses.isnan().tolist() == [False, False, True, True]
    assert few.loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing(mtp, reentrant):
    tokens_BT = torch.randint(3, 512, (2, 12))

    def gradients():
        mtp.zero_grad()
        mtp.train()(tokens_BT, labels=tokens_BT).loss.backward()
        return {name: p.grad.clone() for name, p in mtp.named_parameters()}

    try:
        want = gradients()
        assert all(grad.any() for grad in want.values())
        mtp.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
    finally:
        mtp.gradient_checkpointing_disable()
        mtp.zero_grad()
        mtp.eval()
    for name in want:
        torch.testing.assert_close(found[name], want[name], msg=name)


# ------------------------------------------------------------------------------ generate


def test_greedy_text_in_fewer_forwards(mtp, plain):
    for how in (prompts(7), prompts(9, 4, 1, 6), prompts(5, 5)):
        want = plain.generate(**how, max_new_tokens=60, do_sample=False)
        assert torch.equal(mtp.generate(**how, max_new_tokens=60, do_sample=False), want)
        assert mtp.last_tokens_per_forward > 1.3
        again = mtp.generate(**how, max_new_tokens=60, do_sample=False, mtp=False)
        assert torch.equal(again, want)
        assert mtp.last_tokens_per_forward == 1.0
    assert torch.equal(
        mtp.generate(**how, max_length=8, do_sample=False),
        plain.generate(**how, max_length=8, do_sample=False),
    )
    one = mtp.generate(**prompts(7), max_new_tokens=1)
    assert one.shape[1] == 8
    assert mtp.last_tokens_per_forward is None


def test_as_many_forwards_as_our_own_decoder(made, mtp, tiny_tokenizer_path, monkeypatch):
    """Exactness says nothing of the guesses: what is accepted does. Rows end at unlike places."""
    how = prompts(9, 4, 1, 6, seed=1)
    requests = [
        Request(tuple(row[mask == 1].tolist()), seed=0)
        for row, mask in zip(how["input_ids"], how["attention_mask"], strict=True)
    ]
    settings = dict(temperature=0.0, top_p=1.0, top_k=0, stop=(), dtype=torch.float32, batch_size=9)
    monkeypatch.setattr(Llama2Tokenizer, "eos_id", 305)
    tokenizer = Llama2Tokenizer(str(tiny_tokenizer_path))
    done = generate(
        made[1], tokenizer, requests, decoding="self_speculative", max_new_tokens=60, **settings
    )
    found = mtp.generate(**how, max_new_tokens=60, do_sample=False, eos_token_id=305)
    for row, one in zip(found[:, 9:].tolist(), done, strict=True):
        assert row[: len(one.tokens)] == one.tokens
        assert set(row[len(one.tokens) :]) <= {1}
    assert len({len(one.tokens) for one in done}) > 2
    tokens, forwards = sum(len(one.tokens) - 1 for one in done), sum(one.forwards for one in done)
    assert mtp.last_tokens_per_forward == tokens / forwards > 1.5


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.01}],
)
def test_sampled_text_is_a_plain_generates(mtp, plain, sampling):
    """After one seed, two calls in a row: the generator is left where a plain run leaves it."""
    how = prompts(9, 4, 1, 6) | dict(max_new_tokens=40, do_sample=True) | sampling
    texts = []
    for model in (plain, mtp):
        torch.manual_seed(3)
        texts.append([model.generate(**how), model.generate(**how, num_return_sequences=2)])
    for one, other in zip(*texts, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(texts[0][0], texts[0][1][::2, : texts[0][0].shape[1]])
    assert mtp.last_tokens_per_forward > 1.2
    lengths = [(row == 2).nonzero()[:1].tolist() for row in texts[0][0]]
    assert len({str(n) for n in lengths}) > 1  # rows end at unlike places


def test_stop_strings(mtp, plain, tokenizer):
    how = prompts(9, 4) | dict(max_new_tokens=60, do_sample=False)
    text = plain.generate(**how)[0, 9:]
    stop = tokenizer.decode(text[6:8])
    how |= dict(stop_strings=[stop], tokenizer=tokenizer)
    want = plain.generate(**how)
    assert torch.equal(mtp.generate(**how), want)
    assert want.shape[1] < 9 + 60
    assert mtp.last_tokens_per_forward > 1


def test_streaming(mtp, plain):
    class Streamer:
        def __init__(self):
            self.put, self.ended = [].append, False
            self.got = self.put.__self__

        def end(self):
            self.ended = True

    seen = []
    for model in (mtp, plain):
        streamer = Streamer()
        model.generate(**prompts(7), max_new_tokens=30, do_sample=False, streamer=streamer)
        assert streamer.ended
        seen.append([part.tolist() for part in streamer.got])
    assert seen[0] == seen[1]
    assert len(seen[0]) > 10


def test_both_ways_of_custom_generate(made, mtp, plain):
    how = prompts(9, 4) | dict(max_new_tokens=30, do_sample=False)
    want = plain.generate(**how)
    named = how | dict(custom_generate=str(made[0] / "hf-mtp"), trust_remote_code=True)
    for call in (mtp.generate, type(mtp).generate.__get__(mtp)):
        mtp.last_tokens_per_forward = None
        assert torch.equal(call(**named), want)
        assert mtp.last_tokens_per_forward > 1
        assert torch.equal(call(**named, mtp=False), want)
        assert mtp.last_tokens_per_forward == 1.0
    with pytest.raises(ValueError, match="LlamaForCausalLM has no extra heads: load this folder"):
        plain.generate(**named)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor may look at the tokens"),
        ({"num_beams": 2}, None),  # transformers' own loop
        (
            {"return_dict_in_generate": True, "output_scores": True},
            "output_scores asks for every forward's",
        ),
        ({"eos_token_id": None}, "there is no eos_token_id"),
        ({"use_cache": False}, "use_cache is off"),
        (
            {"attention_mask": torch.tensor([[0] * 9, [1] * 9])},
            "a prompt is empty",
        ),
    ],
)
def test_what_falls_back(made, mtp, plain, option, reason):
    how = prompts(9, 4) | dict(max_new_tokens=12, do_sample=False) | option
    if "eos_token_id" in option:
        for model in (mtp, plain):
            model.generation_config.eos_token_id = None
    try:
        want, found = plain.generate(**how), mtp.generate(**how)
    finally:
        mtp.generation_config.eos_token_id = plain.generation_config.eos_token_id = 2
    if not torch.is_tensor(want):
        assert len(found.scores) == 12
        want, found = want.sequences, found.sequences
    assert torch.equal(found, want)
    assert mtp.last_tokens_per_forward == (1.0 if reason else None)
    decoding = sys.modules[type(mtp).__module__.replace("modeling", "decoding")]
    said = []
    original = decoding.why_not
    module = sys.modules[type(mtp).__module__]
    module.why_not = lambda *args: said.append(original(*args)) or said[-1]
    try:
        mtp.generation_config.eos_token_id = None if "eos_token_id" in option else 2
        mtp.generate(**how)
    finally:
        module.why_not = original
        mtp.generation_config.eos_token_id = 2
    assert [s.startswith(reason) for s in said] == ([True] if reason else [])


def test_logits_that_are_no_numbers(loaded):
    model = loaded("hf-mtp")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN: check its weights"):
        model.generate(**prompts(9), max_new_tokens=3)


def test_in_bf16_and_with_eager_attention(loaded):
    how = prompts(9, 4) | dict(max_new_tokens=30, do_sample=False)
    for name, settings in (("sdpa", {"dtype": torch.bfloat16}), ("eager", {})):
        settings |= {"attn_implementation": name}
        mtp, plain = (loaded(folder, **settings) for folder in ("hf-mtp", "hf"))
        found, want = mtp.generate(**how), plain.generate(**how)
        assert mtp.last_tokens_per_forward > 1
        if name == "eager":
            assert torch.equal(found, want)
        else:  # bf16 ties logits, so only the beginning is sure to be the same
            assert torch.equal(found[:, :12], want[:, :12])
        assert mtp.lm_head.weight.dtype == settings.get("dtype", torch.float32)


# --------------------------------------------------------------------------- other folders


def same_weights(one, other, dtype=None):
    a, b = Checkpoint(one), Checkpoint(other)
    assert a.args == b.args
    keys = list(mtp_llama2(**a.args).state_dict())
    assert any(key.startswith("heads.3.") for key in keys)
    for key in keys:
        x, y = a.read(key), b.read(key)
        assert torch.equal(x, y if dtype is None else y.to(dtype)), key


def test_back_to_meta_and_on_to_others(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "HF_SHARD_BYTES", 50_000)
    src = str(made[0] / "meta")
    ways = [("mtp", src, "hf-mtp"), ("meta", "mtp", "meta"), ("again", "mtp", "hf-mtp")]
    for name, of, to in (*ways, ("hf", "mtp", "hf")):
        of = of if of == src else str(tmp_path / of)
        assert convert.main([of, str(tmp_path / name), "--to", to]) == 0, capsys.readouterr().err
    index = json.loads((tmp_path / "mtp" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    before, after = (
        torch.load(folder / "meta" / "consolidated.pth") for folder in (made[0], tmp_path)
    )
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    same_weights(src, tmp_path / "again")
    monkeypatch.undo()
    whole = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        whole |= load_file(file)
    want = load_file(made[0] / "hf" / "model.safetensors")
    assert whole.keys() == want.keys()
    assert all(torch.equal(whole[key], want[key]) for key in want)
    # As a checkpoint_dir: the recipes build and fill the model from it.
    args = model_args_from_folder(tmp_path / "mtp", max_seq_len=64)
    assert args == ARGS | {"max_seq_len": 64}
    model = mtp_llama2(**args)
    load_into(model, tmp_path / "mtp", device="cpu")
    assert all(torch.equal(a, made[1].state_dict()[k]) for k, a in model.state_dict().items())
    with pytest.raises(ValueError, match="n_future_tokens is 4, the model has 2"):
        model_args_from_folder(tmp_path / "mtp", max_seq_len=64, n_future_tokens=2)


def test_what_transformers_has_trained_comes_back(made, loaded, tmp_path):
    model = loaded("hf-mtp")
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    tokens_BT = torch.randint(3, 512, (1, 12))
    assert torch.equal(again.mtp_logits(tokens_BT), model.mtp_logits(tokens_BT))
    how = prompts(9, 4) | dict(max_new_tokens=30, do_sample=False)
    assert torch.equal(again.generate(**how), model.generate(**how))
    assert again.last_tokens_per_forward > 1
    shutil.copy(made[0] / "hf-mtp" / "tokenizer.model", tmp_path / "saved")
    assert Checkpoint(tmp_path / "saved").args == Checkpoint(made[0] / "hf-mtp").args
    back = Checkpoint(tmp_path / "saved").read("heads.1.mlp.w1.weight")
    assert torch.equal(back, model.extra_heads[0].mlp.gate_proj.weight)


def test_from_a_tied_llama_in_bf16(build, tmp_path, tiny_tokenizer_path, loaded):
    llama = build(ARGS | {"num_layers": 3, "n_future_tokens": 1}).to(torch.bfloat16)
    export.write_hf(llama.state_dict().items(), llama.args, tmp_path / "h", tiny_tokenizer_path)
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    (tmp_path / "h" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for of, name, to in (("h", "mtp", "mtp"), ("mtp", "all", "hf-mtp")):
        assert convert.main([str(tmp_path / of), str(tmp_path / name), "--to", to]) == 0
    same_weights(tmp_path / "mtp", tmp_path / "all")
    model = loaded(tmp_path / "all", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    logits = model.mtp_logits(torch.arange(3, 20)[None])
    assert torch.equal(logits[:, :, 0], logits[:, :, 3])  # copies of one block


@pytest.mark.parametrize("to", ["hf-mtp", "eagle3"])
def test_a_model_of_one_head_is_refused(made, tmp_path, capsys, to):
    assert convert.main([str(made[0] / "hf"), str(tmp_path / "x"), "--to", to]) == 1
    assert f"has one head: --to {to} needs extra heads" in capsys.readouterr().err


def test_heads_are_not_made_twice(made, tmp_path, capsys):
    assert convert.main([str(made[0] / "hf-mtp"), str(tmp_path / "x"), "--to", "mtp"]) == 1
    assert "has extra heads already: --to meta keeps them" in capsys.readouterr().err


def test_the_lines_of_the_page(made, loaded, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("runs/rho1_7b/hf-mtp", str(made[0] / "hf-mtp")), {})
    said = capsys.readouterr().out
    assert said.startswith("<s>def add(a, b):")
    assert float(said.split()[-1]) > 1


FRESH = """
import sys
import torch
for name in ("wmtp_modules", "torchtune", "recipes"):
    assert name not in sys.modules
    sys.modules[name] = None  # not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(5, 12)[None]
text = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
assert model.last_tokens_per_forward > 1, model.last_tokens_per_forward
assert model.mtp_logits(ids).shape == (1, 7, 4, 512)
print(text[0].tolist())
"""


def test_a_process_that_has_not_our_package(made, plain, tmp_path):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # which would load this package's `tune` plugin
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # of tests/nightly/test_newest.py
    command = [sys.executable, "-P", "-c", FRESH, str(made[0] / "hf-mtp")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(5, 12)[None]
    want = plain.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert json.loads(done.stdout) == want[0].tolist()
