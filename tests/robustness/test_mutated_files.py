"""300 damaged files: each is read, or refused in a sentence that names the file."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.checkpoints.hf_tokenizer import write_hf_tokenizer
from wmtp_modules.checkpoints.read import Checkpoint, check_vocab, load_into
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.critic.folder import TrainingState, check_critic, load_value_head, save_critic
from wmtp_modules.critic.rewards import RewardModel
from wmtp_modules.data import rows_dataset
from wmtp_modules.evaluation.evidence import EvidenceStore, read_samples
from wmtp_modules.evaluation.tasks import load_tasks
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run.metric_logging import JSONLLogger
from wmtp_modules.scoring.score_table import ScoreTable, compute_scores

TOTAL = 300
FINGERPRINT = {
    "checkpoint": "c",
    "tokenizer": "t",
    "dataset": "d",
    "max_seq_len": 64,
    "kind": "next-token loss",
    "n_heads": 1,
}
CRITIC_FINGERPRINT = {"head": "turn", "trunk": "t"}


def score(rows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.cumsum(row).astype(np.float32) for row in rows]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path):
    return llama2_tokenizer(str(tiny_tokenizer_path), max_seq_len=64)


@pytest.fixture(scope="module")
def scored_rows():
    tokens = [list(range(1, 2 + i % 30)) for i in range(90)]
    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"tokens": tokens}, features=features)


@pytest.fixture(scope="module")
def mbpp_tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "mbpp.jsonl"
    rows = [
        {
            "task_id": i,
            "text": f"Return {i}.",
            "code": f"def f(): return {i}",
            "test_list": [f"assert f() == {i}"],
            "test_setup_code": "",
        }
        for i in (2, 3, 4, 11, 12, 13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Readers:
    """Makes a sound folder of each kind, and reads it as the recipes do."""

    def __init__(self, tokenizer_path: Path, tokenizer, rows: Path, scored, tasks: Path) -> None:
        self._tokenizer_path, self._tokenizer = tokenizer_path, tokenizer
        self._rows, self._scored, self._tasks = rows, scored, tasks
        self._args = dict(
            vocab_size=512,
            num_layers=4,
            n_future_tokens=2,
            num_heads=2,
            num_kv_heads=2,
            embed_dim=16,
            max_seq_len=64,
            intermediate_dim=32,
            norm_eps=1e-5,
            rope_base=10_000.0,
        )

    # ------------------------------------------------------------------ data

    def make_jsonl(self, folder: Path) -> None:
        shutil.copy(self._rows / "train.jsonl", folder)

    def make_parquet(self, folder: Path) -> None:
        rows = [json.loads(line) for line in (self._rows / "val.jsonl").read_text().splitlines()]
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        assert pq.ParquetFile(folder / "train.parquet").metadata.num_rows == len(rows)

    def make_text(self, folder: Path) -> None:
        for i in range(3):
            (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)

    def read_rows(self, folder: Path) -> None:
        rows = rows_dataset(self._tokenizer, source=str(folder))
        assert len(rows)
        assert len(rows) == len(rows["tokens"][:]) == len(rows["keep"][:])

    read_jsonl = read_parquet = read_text = read_rows

    def make_rows_cache(self, folder: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        rows_dataset(self._tokenizer, source=str(self._rows / "val.jsonl"))
        for lock in folder.rglob("*.lock"):
            lock.unlink()

    def read_rows_cache(self, folder: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        rows = rows_dataset(self._tokenizer, source=str(self._rows / "val.jsonl"))
        assert len(rows) == len(rows["tokens"][:])

    def make_tasks(self, folder: Path) -> None:
        shutil.copy(self._tasks, folder)

    def read_tasks(self, folder: Path) -> None:
        assert load_tasks("mbpp", folder / "mbpp.jsonl", "all")

    def make_samples(self, folder: Path) -> None:
        rows = [{"task_id": i, "completion": f"def f(): return {i}"} for i in (11, 12, 13)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read_samples(self, folder: Path) -> None:
        tasks = load_tasks("mbpp", self._tasks, "all")
        assert read_samples(folder / "samples.jsonl", tasks)

    def make_evidence(self, folder: Path) -> None:
        store = EvidenceStore(folder / "results.jsonl")
        store.append([{"key": f"k{i}", "verdict": "passed", "case": i} for i in range(6)])

    def read_evidence(self, folder: Path) -> None:
        store = EvidenceStore(folder / "results.jsonl")
        for i in range(6):
            if f"k{i}" in store:
                store[f"k{i}"]

    def make_metrics(self, folder: Path) -> None:
        logger = JSONLLogger(folder / "metrics.jsonl")
        for step in range(1, 6):
            logger.log_dict({"loss": 1 / step}, step=step)
        logger.close()

    def read_metrics(self, folder: Path) -> None:
        logger = JSONLLogger(folder / "metrics.jsonl", resume_step=3)
        logger.log_dict({"loss": 0.5}, step=4)
        logger.close()
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

    # ------------------------------------------------------------ checkpoints

    def make_tokenizer(self, folder: Path) -> None:
        shutil.copy(self._tokenizer_path, folder / "tokenizer.model")

    def read_tokenizer(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        check_vocab(path, 512)
        llama2_tokenizer(str(path), max_seq_len=64).encode("def f(x):\n    return x")
        write_hf_tokenizer(path, folder, max_seq_len=64)

    def make_meta(self, folder: Path) -> None:
        model = mtp_llama2(**self._args)
        init_weights_(model, 0)
        save_meta(model, folder, tokenizer_path=self._tokenizer_path, dtype=torch.float32)

    def make_hf(self, folder: Path) -> None:
        model = mtp_llama2(**self._args | {"num_layers": 3, "n_future_tokens": 1})
        init_weights_(model, 0)
        write_hf(model.state_dict().items(), model.args, folder, self._tokenizer_path)
        # In two shards, so that there is an index.
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {"a.safetensors": sorted(state)[::2], "b.safetensors": sorted(state)[1::2]}
        for name, keys in shards.items():
            save_file({key: state[key] for key in keys}, folder / name)
        index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def read_checkpoint(self, folder: Path) -> None:
        args = Checkpoint(folder).args
        with torch.device("meta"):
            model = mtp_llama2(**args | {"max_seq_len": 64})
        load_into(model, folder, device="cpu")
        assert model(torch.arange(8)[None]).shape == (1, 8, args["n_future_tokens"], 512)

    read_meta = read_hf = read_checkpoint

    # ---------------------------------------------------------------- scores

    def make_scores(self, folder: Path) -> None:
        compute_scores(folder, FINGERPRINT, self._scored, score, batch_tokens=200, part_rows=40)

    def read_scores(self, folder: Path) -> None:
        table = ScoreTable.open(folder, FINGERPRINT, self._scored)
        for row, (expected,) in enumerate(
            map(score, ([np.array(t)] for t in self._scored["tokens"]))
        ):
            np.testing.assert_array_equal(table[row], expected)

    make_scores_resumed = make_scores

    def read_scores_resumed(self, folder: Path) -> None:
        (folder / "manifest.json").unlink(missing_ok=True)  # killed before it
        self.make_scores(folder)
        self.read_scores(folder)

    def make_reward_model(self, folder: Path) -> None:
        path = Path(__file__).parents[1] / "critic" / "reward_model_factory.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.make_reward_model(folder)

    def read_reward_model(self, folder: Path) -> None:
        model = RewardModel(folder, device=torch.device("cpu"), dtype=torch.float32)
        assert np.isfinite(model.score([("a", "b"), ("def f", "return 1")])).all()

    def make_critic(self, folder: Path) -> None:
        head = ValueHead(16, "turn")
        torch.nn.init.normal_(next(head.parameters()))
        record = {"fingerprint": CRITIC_FINGERPRINT, "settings": {"seed": 1}, "report": {"auc": 1}}
        save_critic(folder, head, record)

    def read_critic(self, folder: Path) -> None:
        check_critic(folder, CRITIC_FINGERPRINT, {"seed": 1})
        load_value_head(folder, 16)

    def make_critic_state(self, folder: Path) -> None:
        torch.save(self._critic_state(), folder / "state.pt")

    def _critic_state(self) -> dict:
        head = ValueHead(16, "turn")
        optimizer = torch.optim.AdamW(head.parameters())
        return {
            "fingerprint": CRITIC_FINGERPRINT,
            "step": 3,
            "heldout_losses": [1.0],
            "evaluations_since_best": 0,
            "head": head.state_dict(),
            "best_head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
        }

    def read_critic_state(self, folder: Path) -> None:
        head = ValueHead(16, "turn")
        TrainingState(folder, CRITIC_FINGERPRINT).resume(head, torch.optim.AdamW(head.parameters()))


KINDS = (
    "jsonl", "parquet", "text", "rows_cache", "tasks", "samples", "evidence", "metrics",
    "tokenizer", "meta", "meta", "hf", "hf", "scores", "scores", "scores_resumed", "critic",
    "critic_state", "reward_model", "reward_model",
)  # fmt: skip


@pytest.fixture
def readers(tiny_tokenizer_path, tokenizer, text_rows, scored_rows, mbpp_tasks):
    return Readers(tiny_tokenizer_path, tokenizer, text_rows, scored_rows, mbpp_tasks)


def test_mutated_files(readers, tmp_path, mutate, judge, monkeypatch):
    pytest.importorskip("transformers", reason="the reward extra is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = random.Random(7)
    read: Callable[[Path], None]
    sound = {}
    for kind in dict.fromkeys(KINDS):
        sound[kind] = tmp_path / kind
        if kind not in ("meta", "hf"):
            sound[kind].mkdir()
        getattr(readers, f"make_{kind}")(sound[kind])
        copy = tmp_path / f"{kind}_undamaged"
        shutil.copytree(sound[kind], copy)
        getattr(readers, f"read_{kind}")(copy)  # the judge would not see a broken test
    for number in range(TOTAL):
        kind = KINDS[number % len(KINDS)]
        read = getattr(readers, f"read_{kind}")
        folder = tmp_path / f"damaged_{number}"
        shutil.copytree(sound[kind], folder)
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data = file.read_bytes()
        change = mutate.change_json if ".json" in file.suffix else mutate.change_bytes
        if rng.random() < 0.05:
            file.unlink()
            file.mkdir()  # a folder where a file should be
        elif rng.random() < 0.05:
            file.unlink()
        else:
            file.write_bytes(change(data, rng))
        what = f"{number} {file.name}"
        names = (file.name, folder.name)
        ran = judge.judge(kind, what, names, lambda read=read, folder=folder: read(folder))
        if kind == "scores_resumed" and not ran:  # what was refused does not look complete
            refused = False
            try:
                readers.read_scores(folder)
            except (ValueError, OSError):
                refused = True
            assert refused, what
    assert not judge.problems, "\n".join(judge.problems)
