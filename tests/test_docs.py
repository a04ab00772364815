"""Documents hold what they say: their code runs, their messages are the program's, and both READMEs agree."""

import ast
import importlib.util
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(path: Path, language: str | None = None) -> list[str]:
    """Fenced blocks of a document, of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for of, text in found if language in (None, of)]


# ------------------------------------------------------------------- a weighting of your own

AFTER = 'log = utils.get_logger("INFO")\n'


@pytest.fixture(scope="module")
def copied_recipe(tmp_path_factory) -> Path:
    """The recipe with the block of docs/add_a_weighting.md where the page says."""
    code, _ = blocks(DOCS / "add_a_weighting.md", "python")
    before, after = (ROOT / "recipes" / "rho1_wmtp_distributed.py").read_text().split(AFTER)
    path = tmp_path_factory.mktemp("copied") / "mine.py"
    path.write_text(before + AFTER + code + after)
    return path


def test_the_weighting_of_the_page(copied_recipe, monkeypatch):
    """Its own test, and that test fails for weights that are wrong in a way it names."""
    spec = importlib.util.spec_from_file_location("mine", copied_recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, code = blocks(DOCS / "add_a_weighting.md", "python")
    names = {"torch": torch}
    exec(code, names)
    torch.manual_seed(0)
    names["test_the_weighting"](module.TokenWeighting)
    with pytest.raises(ValueError, match="weighting.gamma must be at least 0, got -1"):
        module.TokenWeighting("focal", gamma=-1)
    for wrong in (
        lambda log_raw, mask, *_: torch.where(mask, log_raw.exp(), 0.0).float(),  # mean not 1
        lambda log_raw, mask, *bounds: calibrate(-log_raw, mask, *bounds),  # turned round
    ):
        calibrate = module.calibrate_log
        with monkeypatch.context() as patch:
            patch.setattr(module, "calibrate_log", wrong)
            with pytest.raises(AssertionError):
                names["test_the_weighting"](module.TokenWeighting)


@pytest.mark.slow
def test_a_run_of_the_page(copied_recipe, forks, tmp_path, tiny_tokenizer_path):
    """The copy trains under it and beside a control, with the page's keys."""
    rows = [json.dumps({"text": textwrap.__doc__ * 3 + str(i)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"_component_": "wmtp_modules.data.rows_dataset", "source": str(tmp_path / "rows.jsonl")}
    model = {"vocab_size": 512, "num_layers": 5, "n_future_tokens": 4, "num_heads": 2}
    tokenizer = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
    (page,) = [text for text in blocks(DOCS / "add_a_weighting.md", "yaml") if "focal" in text]
    cfg = yaml.safe_load(page) | {
        **{"output_dir": str(tmp_path / "run"), "device": "cpu", "dtype": "fp32", "seed": 0},
        **{"fp32_master_weights": True, "checkpointer": None, "dataset": data, "dataset_val": data},
        "model": model
        | {"_component_": "wmtp_modules.models.mtp_llama2", "num_kv_heads": 2}
        | {"embed_dim": 32, "max_seq_len": 64},
        "tokenizer": tokenizer | {"path": str(tiny_tokenizer_path), "max_seq_len": 64},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
        **{"batch_size": 2, "gradient_accumulation_steps": 1, "num_warmup_steps": 1},
        **{"clip_grad_norm": 1.0, "max_steps": 3, "run_val_every_n_steps": 3, "keep_last": 1},
        **{"save_every_n_steps": 3, "log_every_n_steps": 1, "compile": False},
        **{"resume_from_checkpoint": False, "max_skipped_steps": 1, "collective_timeout_s": 300},
        **{"enable_activation_checkpointing": False, "profiler": {"enabled": False}},
        "controls": ["uniform"],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(cfg))
    done = forks.run([copied_recipe, "--config", tmp_path / "mine.yaml"])
    assert done.wait() == [0], done.stderr
    losses = json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_loss"]
    assert {"base", "uniform", "focal"} <= losses.keys()
    assert losses["focal"] != losses["uniform"]
