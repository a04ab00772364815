import datasets
import pytest
from torchtune.models.llama2 import llama2_tokenizer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Each test has a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_path):
    return llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=64)


@pytest.fixture
def make_jsonl(tmp_path):
    """Writes rows, dicts or raw bytes, one a line."""
    import json

    def make(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return make
