"""A user's path: an ordinary Llama, heads added and trained beside it, and served with them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules import convert
from wmtp_modules.checkpoints.read import load_into, model_args_from_folder
from wmtp_modules.models import mtp_llama2

ROOT = Path(__file__).parents[2]
VERBS = {"add": "+", "subtract": "-", "multiply": "*"}
TEXTS = [
    f"def {verb}_{n}(x):\n    result = x {sign} {n}\n    return result\n"
    for n in range(100)
    for verb, sign in VERBS.items()
]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_tokenizer_path):
    """Made, trained and saved by transformers alone; with its tokenizer.model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Llama2Tokenizer(str(tiny_tokenizer_path))
    rows = [tokenizer.encode(text) for text in TEXTS]
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        chosen = rows[step % 18 :: 18]
        T = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (T - len(row)) for row in chosen])
        labels = torch.tensor([row + [-100] * (T - len(row)) for row in chosen])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("llama")
    model.eval().save_pretrained(folder)
    shutil.copy(tiny_tokenizer_path, folder / "tokenizer.model")
    return model, folder


def config(folder, tokenizer_path):
    """Heads 1 to 3 train on text, and nothing else."""
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    data = {"_component_": "wmtp_modules.data.rows_dataset", "source": str(folder / "rows.jsonl")}
    tokenizer = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
    return {
        **{"output_dir": str(folder / "run"), "device": "cpu", "dtype": "fp32", "seed": 0},
        **{"fp32_master_weights": True, "extra_heads": "only", "weighting": {"name": "uniform"}},
        "model": {"_component_": "wmtp_modules.models.mtp_from_checkpoint"}
        | {"checkpoint_dir": str(folder / "mtp")},
        "checkpointer": {"checkpoint_dir": str(folder / "mtp")},
        "tokenizer": tokenizer | {"path": str(tokenizer_path), "max_seq_len": 64},
        **{"dataset": data, "dataset_val": data, "batch_size": 8, "gradient_accumulation_steps": 1},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
        **{"num_warmup_steps": 5, "clip_grad_norm": 1.0, "max_steps": 150, "compile": False},
        **{"run_val_every_n_steps": 150, "save_every_n_steps": 150, "keep_last": 1},
        **{"resume_from_checkpoint": False, "max_skipped_steps": 1, "collective_timeout_s": 300},
        **{"enable_activation_checkpointing": False, "profiler": {"enabled": False}},
        "log_every_n_steps": 50,
    }


FRESH = """
import json, sys, torch
sys.modules["wmtp_modules"] = sys.modules["torchtune"] = None  # not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
texts = []
for prompt in json.loads(sys.argv[2]):
    how = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    text = model.generate(torch.tensor([prompt]), **how)[0].tolist()
    texts += [text, model.last_tokens_per_forward]
print(json.dumps(texts))
"""


def test_the_path(llama, forks, tmp_path, tiny_tokenizer_path):
    model, folder = llama
    assert convert.main([str(folder), str(tmp_path / "mtp"), "--to", "mtp"]) == 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path, tiny_tokenizer_path)))
    recipe = ROOT / "recipes" / "rho1_wmtp_distributed.py"
    done = forks.run([recipe, "--config", tmp_path / "run.yaml"])
    assert done.wait() == [0], done.stderr

    # Only heads 1 to 3 have moved: what the model says has not.
    trained = tmp_path / "run" / "last"
    before, after = (
        torch.load(place / "consolidated.pth") for place in (tmp_path / "mtp", trained)
    )
    for key in before:
        assert torch.equal(before[key], after[key]) != key.startswith("extra_heads."), key
    for to in ("hf-mtp", "eagle3"):
        assert convert.main([str(trained), str(tmp_path / to), "--to", to]) == 0

    # A process without this package writes the plain model's text in fewer forwards.
    tokenizer = Llama2Tokenizer(str(tiny_tokenizer_path))
    prompts = [tokenizer.encode(text.split("\n")[0], add_eos=False) for text in TEXTS[100:106]]
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "hf-mtp"), json.dumps(prompts)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for prompt, text, per_forward in zip(prompts, said[::2], said[1::2], strict=True):
        how = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert text == model.generate(torch.tensor([prompt]), **how)[0].tolist()
        assert per_forward > 1.5
    print("tokens per forward", said[1::2])

    # And a server that drafts with head 1 drafts what head 1 says.
    path = ROOT / "tests" / "checkpoints" / "test_eagle3.py"
    spec = importlib.util.spec_from_file_location("eagle3_tests", path)
    eagle3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eagle3)
    ours = mtp_llama2(**model_args_from_folder(trained, max_seq_len=64))
    load_into(ours, trained, device="cpu")
    ids = torch.tensor([tokenizer.encode(TEXTS[100])])
    with torch.no_grad():
        hidden_TD = model(ids, output_hidden_states=True).hidden_states[2][0]  # two trunk blocks
        found = eagle3.server_logits(
            "vllm",
            tmp_path / "eagle3",
            hidden_TD,
            torch.randn(hidden_TD.shape),
            torch.arange(len(hidden_TD)),
        )
        torch.testing.assert_close(found, ours(ids)[0, :, 1].double(), atol=1e-5, rtol=0)
