"""A run of seconds that reads and writes in a store."""

import json
import textwrap
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def config(s3, tmp_path, tiny_tokenizer_path):
    """config(**changes): a file with a run of seconds, which reads and writes in the store."""
    text = Path(textwrap.__file__).read_text()
    for name, part in {"train": text[:6000], "val": text[10000:11000]}.items():
        rows = [json.dumps({"text": part[i : i + 40]}) for i in range(0, len(part), 40)]
        s3.put_object(Bucket="bucket", Key=f"{name}.jsonl", Body="\n".join(rows).encode())
    s3.put_object(Bucket="bucket", Key="tok.model", Body=tiny_tokenizer_path.read_bytes())

    def write(**changes):
        rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
        model = {"vocab_size": 512, "num_layers": 5, "n_future_tokens": 4, "num_heads": 2}
        model |= {"num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
        tokenizer = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
        cfg = {
            "output_dir": "s3://bucket/run",
            "storage": {"cache": str(tmp_path / "cache")},
            **{"device": "cpu", "dtype": "fp32", "fp32_master_weights": True, "seed": 1},
            "resume_from_checkpoint": True,
            "model": {"_component_": "wmtp_modules.models.mtp_llama2", **model},
            "checkpointer": None,
            "tokenizer": {**tokenizer, "path": "s3://bucket/tok.model", "max_seq_len": 64},
            "dataset": {**rows_of, "source": "s3://bucket/train.jsonl"},
            "dataset_val": {**rows_of, "source": "s3://bucket/val.jsonl"},
            **{"batch_size": 2, "gradient_accumulation_steps": 1},
            "weighting": {"name": "uniform"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
            **{"num_warmup_steps": 2, "clip_grad_norm": 1.0, "max_steps": 4},
            **{"run_val_every_n_steps": 2, "save_every_n_steps": 2, "keep_last": 1},
            **{"max_skipped_steps": 1, "collective_timeout_s": 300, "log_every_n_steps": 1},
            **{"activation_checkpointing": "none", "compile": False},
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": str(tmp_path / "logs"),
            },
            "profiler": {"enabled": False},
        } | changes
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(cfg))
        return file

    return write


@pytest.fixture(autouse=True)
def no_folder_of_that_name():
    """A URL that something takes for a path is a folder ``s3:`` where the command was started."""
    yield
    assert not Path("s3:").exists()
