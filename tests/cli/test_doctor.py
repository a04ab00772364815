"""A page about a config: what it would read, need and reach, and what would stop it."""

import json
import re

import pytest
import yaml
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules import doctor
from wmtp_modules.data.rows import rows_dataset
from wmtp_modules.run import storing


@pytest.fixture
def page(tmp_path, tiny_tokenizer_path, monkeypatch, capsys):
    """page(rows, *words, **changes): exit code and text of the doctor for a tiny config."""
    monkeypatch.setattr(storing, "_places", {})

    def made(rows, *words, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
        rows_of["source"] = str(tmp_path / "rows.jsonl")
        tokenizer = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
        cfg = {
            "output_dir": str(tmp_path / "out"),
            **{"device": "cpu", "dtype": "fp32", "fp32_master_weights": True, "seed": 1},
            "resume_from_checkpoint": False,
            "model": {
                "_component_": "wmtp_modules.models.mtp_llama2",
                **{"vocab_size": 512, "num_layers": 5, "n_future_tokens": 4, "num_heads": 2},
                **{"num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64},
            },
            "checkpointer": None,
            "tokenizer": {**tokenizer, "path": str(tiny_tokenizer_path), "max_seq_len": 64},
            **{"dataset": rows_of, "dataset_val": rows_of},
            **{"batch_size": 2, "gradient_accumulation_steps": 1, "weighting": {"name": "uniform"}},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
            **{"num_warmup_steps": 1, "clip_grad_norm": 1.0, "max_steps": 7, "keep_last": 1},
            **{"run_val_every_n_steps": 2, "save_every_n_steps": 2, "max_skipped_steps": 1},
            **{"collective_timeout_s": 300, "log_every_n_steps": 1, "compile": False},
            **{"activation_checkpointing": "none", "profiler": {"enabled": False}},
        } | changes
        file = tmp_path / "config.yaml"
        file.write_text("# recipe: rho1_wmtp_distributed\n" + yaml.safe_dump(cfg))
        code = doctor.main([str(file), *words])
        return code, capsys.readouterr().out

    return made


PAIRS = [{"prompt": "Add them.\n", "response": "a + b"}, {"prompt": "Say it.\n", "response": "yes"}]


def test_a_page_shows_rows_as_the_model_sees_them(page):
    code, text = page([*PAIRS, PAIRS[0]], "--ranks", "2", "--tokens-per-s", "0.001")
    assert code == 0, text
    assert re.search(r"row 0, supervised tokens in «»:\n +\S*\s*Add them\.\n +«\s?a \+ b.*»", text)
    assert "1 rows are there twice" in text
    assert "1 run: uniform; 7 steps" in text
    tokens = float(re.search(r"([\d,]+) tokens a step", text)[1].replace(",", ""))
    hours = float(re.search(r"([\d,.]+) hours at", text)[1].replace(",", ""))
    assert hours == pytest.approx(7 * tokens / 0.001 / 3600, abs=7 / 0.001 / 3600)
    assert re.search(r"Memory +\d+\.\d\d GiB at the peak of each of 2 ranks", text)
    assert "no MLflow store" in text
    assert text.rstrip().splitlines()[-1].startswith("0 problems")


def test_what_of_the_heads_trains_is_told(page, monkeypatch):
    monkeypatch.setattr(doctor, "memory_part", lambda *_: iter(()))  # takes long
    _, text = page(PAIRS, extra_heads="isolated")
    n = re.search(r"([\d.]+) M parameters, 4 heads", text)[1]
    assert f"{n} M parameters train" in text
    assert "extra_heads isolated: heads 1 to K - 1 train beside trunk and head 0" in text


def test_large_data_is_sampled_and_no_run_ever_sees_the_sample(
    page, tmp_path, tiny_tokenizer_path, monkeypatch
):
    monkeypatch.setattr(doctor, "SAMPLE_BYTES", 2000)
    rows = [{"text": f"line {i} of a text"} for i in range(2000)]
    code, text = page(rows)
    assert code == 0, text
    share = 2000 / sum(len(json.dumps(row)) + 1 for row in rows)
    assert f"from the first {share:.2%} of its bytes" in text
    shown = int(re.search(r"rows.jsonl \(train\): ([\d,]+) rows", text)[1].replace(",", ""))
    assert shown < 500
    tokenizer = llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=64)
    assert len(rows_dataset(tokenizer, source=str(tmp_path / "rows.jsonl"))) == 2000


def test_what_would_stop_the_run_stands_at_the_end(page, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    needs = {"uri": "http://me:hunter2@127.0.0.1:9", "required": True}
    changes = {
        "checkpointer": {"checkpoint_dir": "nowhere?token=hunter2hunter2"},
        "tracking": needs,
    }
    code, text = page(PAIRS, **changes)
    assert code == 1
    *_, first, second = text.rstrip().splitlines()
    assert first.startswith("- Model: nowhere?token=*** is not a checkpoint")
    assert second.startswith("- Tracking: the MLflow store http://***@127.0.0.1:9 cannot be used")
    assert "hunter2" not in text


def test_a_config_that_is_refused_is_told_with_nothing_below(page):
    code, text = page(PAIRS, "optimizer.lr=-1", max_stepz=3)
    assert code == 1
    assert "- Config: max_stepz" in text
    assert "- Config: optimizer.lr" in text
    assert "Memory" not in text


def test_what_the_run_makes_first_is_no_problem(page, tmp_path):
    gone = {"_component_": "wmtp_modules.data.rows_dataset", "source": str(tmp_path / "later")}
    made = {"_component_": "wmtp_modules.quickstarts.stdlib.prepare_stdlib", "seed": 0}
    made |= {"assets_dir": str(tmp_path / "assets"), "vocab_size": 512, "corrupted_share": 0.4}
    code, text = page(PAIRS, dataset=gone, prepare=made)
    assert code == 0, text
    assert "Data        not yet, the run makes it (prepare)" in text
