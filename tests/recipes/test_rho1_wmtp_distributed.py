"""The recipe run for real on one process: small models, real text, every stage."""

import importlib.util
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.check import ConfigError
from wmtp_modules.config.rules import cpp_compiler
from wmtp_modules.data import packing, rows_dataset
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.process_group import init_process_group, patient_barrier
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.run import start
from wmtp_modules.run.figures import Throughput
from wmtp_modules.run.run import Run
from wmtp_modules.run.stopping import Stopped, StopRequests
from wmtp_modules.run.training_state import TrainingStates
from wmtp_modules.scoring import reference as references

pytestmark = pytest.mark.usefixtures("drawn")  # pictures are not

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not cpp_compiler(), reason="torch.compile finds no C++ compiler ($CXX or g++)"
)


def import_recipe():
    """The recipe's module; tests are its only importer."""
    spec = importlib.util.spec_from_file_location(
        "rho1_recipe", ROOT / "recipes" / "rho1_wmtp_distributed.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return import_recipe()


@pytest.fixture(scope="module")
def one_process():
    """Device and mesh of a process that torchrun did not start."""
    yield init_process_group("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def base_config(tmp_path_factory, tiny_tokenizer_path):
    """A run from nothing in a second or two; tests override what they are about."""
    import textwrap as source_of_text

    folder = tmp_path_factory.mktemp("recipe")
    text = Path(source_of_text.__file__).read_text()
    for name, part in {"train": text[:10000], "val": text[10000:12000]}.items():
        # Short enough that a pack holds two or three documents.
        rows = [{"text": part[i : i + 40]} for i in range(0, len(part), 40)]
        if name == "train":
            rows = [row | {"noise": [[0, 4]]} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
    return OmegaConf.create(
        {
            "output_dir": str(folder / "base"),
            "device": "cpu",
            "dtype": "fp32",
            "fp32_master_weights": True,
            "seed": 1,
            "resume_from_checkpoint": False,
            "model": {
                "_component_": "wmtp_modules.models.mtp_llama2",
                "vocab_size": 512,
                "num_layers": 5,
                "n_future_tokens": 4,
                "num_heads": 2,
                "num_kv_heads": 2,
                "embed_dim": 32,
                "max_seq_len": 64,
            },
            "checkpointer": None,
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": str(tiny_tokenizer_path),
                "max_seq_len": 64,
            },
            "dataset": rows_of | {"source": str(folder / "train.jsonl")},
            "dataset_val": rows_of | {"source": str(folder / "val.jsonl")},
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "weighting": {"name": "uniform"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
            "num_warmup_steps": 2,
            "clip_grad_norm": 1.0,
            "max_steps": 6,
            "run_val_every_n_steps": 3,
            "save_every_n_steps": 3,
            "keep_last": 1,
            "max_skipped_steps": 1,
            "collective_timeout_s": 300,
            "log_every_n_steps": 1,
            "activation_checkpointing": "none",
            "compile": False,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": str(folder / "logs"),
            },
            "profiler": {"enabled": False},
        }
    )


@pytest.fixture(scope="module")
def stops():
    """Nobody asks for a stop, unless a test does."""
    return StopRequests()


@pytest.fixture(scope="module")
def run(recipe, one_process, base_config, tmp_path_factory, stops):
    """run(overrides) -> (output folder, summary)."""

    def go(overrides=None, output_dir=None):
        output_dir = output_dir or tmp_path_factory.mktemp("run")
        cfg = OmegaConf.merge(base_config, overrides or {}, {"output_dir": str(output_dir)})
        recipe.check(cfg)
        return Path(output_dir), recipe.train_one(cfg, *one_process, stops, {})

    return go


@pytest.fixture(scope="module")
def uniform(run, drawn):
    with drawn():
        return run()


@pytest.fixture(scope="module")
def reference(run):
    """A next-token reference, trained by the same recipe."""
    return run({"model": {"n_future_tokens": 1, "num_layers": 2}, "seed": 2, "max_steps": 3})


@pytest.fixture(scope="module")
def rho1(uniform, reference, tmp_path_factory):
    """Overrides for Rho-1 on top of the uniform run's checkpoint."""
    return {
        "checkpointer": {"checkpoint_dir": str(uniform[0] / "best")},
        "weighting": {"name": "rho1", "selection": "topk", "ratio": 0.6},
        "reference": {
            "mode": "cached",
            "checkpointer": {"checkpoint_dir": str(reference[0] / "last")},
            "table_dir": str(tmp_path_factory.mktemp("scores")),
            "batch_tokens": 256,
        },
    }


@pytest.fixture(scope="module")
def rho1_run(run, rho1):
    return run(rho1)


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(got, want, tolerance=0.0):
    for key, value in weights_of(want).items():
        torch.testing.assert_close(weights_of(got)[key], value, rtol=tolerance, atol=tolerance)


def test_training_lowers_the_heldout_loss_of_every_head(uniform):
    _, summary = uniform
    before, after = summary["heldout_loss"]["base"], summary["heldout_loss"]["uniform"]
    assert len(before) == len(after) == 4
    assert all(b < a for a, b in zip(before, after, strict=True))


def test_what_a_run_leaves(uniform):
    folder, summary = uniform
    for name in ("best", "last"):
        files = {file.name for file in (folder / name).iterdir()}
        assert files == {"consolidated.pth", "params.json", "tokenizer.model"}
    steps = [line for line in metrics_of(folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "lr", "tokens_per_s", "ess", "selected_share", "memory_gib", "grad_norm"}
    expected |= {"padding_share", "clipped_share"} | {f"loss_head_{k}" for k in range(4)}
    assert all(expected <= line.keys() for line in steps)
    assert all(line["ess"] == 1.0 and line["selected_share"] == 1.0 for line in steps)
    assert summary["steps"] == 6
    last = [line for line in metrics_of(folder) if "val_loss" in line][-1]
    assert 1 <= summary["tokens_per_forward"]["uniform"] == last["tokens_per_forward"] <= 4
    shares = [last[f"acceptance_head_{k}"] for k in (1, 2, 3)]
    assert summary["acceptance"]["uniform"]["per_head"] == shares
    assert summary["tokens_per_forward"].keys() == summary["heldout_loss"].keys()
    assert {"tokens_per_forward/word_start", "tokens_per_forward/layout"} < last.keys()
    assert (folder / "curves.png").stat().st_size > 5000
    page = (folder / "run.html").read_text()
    assert "Complete after 6 steps." in page
    assert f"{steps[-1]['lr']:.4g}" in page
    assert "resume_from_checkpoint=true" in page


def test_the_page_shows_the_tokens_that_were_trained_on(rho1_run, base_config):
    """Every document is a row, its weights and losses are those of the last step."""
    folder, _ = rho1_run
    last = metrics_of(folder)[-1]
    record = json.loads((folder / "tokens.json").read_text())
    assert (record["step"], record["of_heads"]) == (6, ["weight", "loss", "reference"])
    assert record["left_out"] == 0
    lines = Path(base_config.dataset.source).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for document in record["documents"]:
        assert "".join(document["tokens"]) == texts[document["row"]]
    for k in range(4):
        heads = [heads[k] for one in record["documents"] for heads in one["heads"] if heads[k]]
        weight, loss, reference = torch.tensor(heads, dtype=torch.float64).T
        assert weight.mean().item() == pytest.approx(last[f"weight_mean_head_{k}"], rel=1e-3)
        assert loss.mean().item() == pytest.approx(last[f"loss_head_{k}"], rel=1e-3)
        excess = loss - reference
        assert excess[weight > 1].min() >= excess[weight == 0].max() - 1e-3
    page = (folder / "run.html").read_text()
    assert page.count("<div class='code'>") == len(record["documents"])
    assert ", reference " in page


def test_what_a_run_leaves_holds_no_secret(run, tmp_path, monkeypatch):
    """Config copy, training state, logs: neither of a URL nor of the environment."""
    monkeypatch.setenv("HF_TOKEN", "open-sesame-42")
    logger = {"uri": "https://me:open-sesame-43@host", "note": "${oc.env:HF_TOKEN}"}
    folder, _ = run(
        {"max_steps": 1, "metric_logger": logger | {"log_dir": str(tmp_path / "out" / "logs")}},
        tmp_path / "out",
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.pt", "summary.json"} <= {path.name for path in files}
    assert [path.name for path in files if b"open-sesame" in path.read_bytes()] == []
    assert "uri: https://***@host" in (folder / "config.yaml").read_text()


def test_first_gradient_is_that_of_the_definition(run, base_config, tmp_path):
    """AdamW would hide a wrong divisor; the logged gradient norm does not."""
    cfg = base_config
    rows = rows_dataset(
        llama2_tokenizer(cfg.tokenizer.path, max_seq_len=64), source=cfg.dataset.source
    )
    packs = PackedDataset(rows, max_seq_len=64, seed=cfg.seed)
    model_args = {k: v for k, v in cfg.model.items() if k != "_component_"}
    model = mtp_llama2(**model_args)
    init_weights_(model, cfg.seed)
    with torch.no_grad():  # large enough weights that what attention sees matters
        for parameter in model.parameters():
            parameter.mul_(3)
    save_meta(model, tmp_path / "m", tokenizer_path=cfg.tokenizer.path, dtype=torch.float32)
    total, targets = 0.0, [0] * 4
    for pack in (packs[i] for i in range(cfg.batch_size)):
        doc = pack["doc"]
        attends = (doc[:, None] == doc[None]) & torch.ones(64, 64, dtype=torch.bool).tril()
        logits = model(pack["tokens"][None], mask=attends[None], input_pos=pack["input_pos"][None])
        log_p = logits[0].log_softmax(-1)
        for t in range(64):
            for k in range(4):
                u = t + k + 1
                if u < 64 and pack["keep"][u] and doc[u] == doc[t]:
                    total = total - log_p[t, k, pack["tokens"][u]] / 4
                    targets[k] += 1
    assert max(int(packs[i]["doc"].max()) for i in range(cfg.batch_size)) >= 1
    loss = total / (sum(targets) / 4)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    start = {"checkpointer": {"checkpoint_dir": str(tmp_path / "m")}}
    folder, _ = run(start | {"max_steps": 1, "num_warmup_steps": 0})
    first = metrics_of(folder)[1]
    assert first["step"] == 1
    assert first["weighted_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_same_config_gives_the_same_bits(run, uniform):
    again, _ = run()
    assert_same_weights(again, uniform[0])


def test_accumulation_4x1_equals_1x4(run, uniform):
    """Micro-batches hold different numbers of targets; dividing each by its own would differ."""
    folder, _ = run({"batch_size": 1, "gradient_accumulation_steps": 4})
    for got, want in zip(metrics_of(folder), metrics_of(uniform[0]), strict=True):
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_no_micro_step_waits_for_the_device(recipe, run, rho1, watched, mode):
    found = watched(recipe.Rho1WMTPRecipeDistributed)
    weighting = {"weighting": {"selection": "soft"}, "max_steps": 1}
    run(OmegaConf.merge(rho1, weighting, {"reference": {"mode": mode}}))
    assert found == []


def test_workers_that_read_ahead_change_nothing(run, uniform):
    folder, _ = run({"dataloader_workers": 2})
    assert_same_weights(folder, uniform[0])


def test_activation_checkpointing_changes_nothing(run, uniform):
    folder, _ = run({"activation_checkpointing": "full"})
    assert_same_weights(folder, uniform[0])


@pytest.mark.slow
@pytest.mark.parametrize(("killed_in", "name"), [(5, "rho1"), (9, "shuffled")])
def test_resumed_equals_uninterrupted(run, recipe, rho1, monkeypatch, killed_in, name):
    """Saved at steps 4 and 8, of which the second is in the second epoch."""
    more = {"max_steps": 10, "save_every_n_steps": 4, "batch_size": 16, "weighting": {"name": name}}
    overrides = OmegaConf.merge(rho1, more)
    whole, summary = run(overrides)
    original = Run._log_step

    def die(self, *args):
        original(self, *args)
        if self.step == killed_in:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_log_step", die)
    killed = whole.parent / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(overrides, killed)
    monkeypatch.undo()
    _, resumed = run(OmegaConf.merge(overrides, {"resume_from_checkpoint": True}), killed)

    assert_same_weights(killed, whole)
    strip = ("tokens_per_s", "memory_gib")
    for got, want in zip(metrics_of(killed), metrics_of(whole), strict=True):
        assert {k: v for k, v in got.items() if k not in strip} == {
            k: v for k, v in want.items() if k not in strip
        }
    assert resumed["heldout_loss"] == summary["heldout_loss"]
    assert resumed["corrupted_share"] == summary["corrupted_share"]
    assert resumed["reference"] == summary["reference"]


def test_lora_trains_adapters_and_resumes_to_the_bit(run, uniform, monkeypatch, tmp_path):
    """Nothing of the base is in a state: it comes from the checkpoint again, which is compared."""
    shutil.copytree(uniform[0] / "best", tmp_path / "base")
    overrides = {
        "checkpointer": {"checkpoint_dir": str(tmp_path / "base")},
        "lora": {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "w2"]},
        "optimizer": {"lr": 0.01},
    }
    whole, summary = run(overrides)
    losses = summary["heldout_loss"]
    assert all(b < a for a, b in zip(losses["base"], losses["uniform"], strict=True))
    assert losses["base"] == pytest.approx(uniform[1]["heldout_loss"]["uniform"], rel=1e-5)
    base = torch.load(tmp_path / "base" / "consolidated.pth", weights_only=True)
    changed = {
        key.split(".", 2)[-1] for key, v in weights_of(whole).items() if (v != base[key]).any()
    }
    assert changed == {"attention.wq.weight", "feed_forward.w2.weight"}
    held = FileSystemReader(whole / "training_state/step_000006").read_metadata()
    model = {key for key in held.state_dict_metadata if key.startswith("model.")}
    assert len(model) == 2 * 2 * 5  # A and B of two layers of each block
    assert all("lora_" in key for key in held.state_dict_metadata)

    original = Run._log_step

    def die(self, *args):
        original(self, *args)
        if self.step == 5:
            self._states.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_log_step", die)
    with pytest.raises(KeyboardInterrupt):
        run(overrides, tmp_path / "killed")
    monkeypatch.undo()
    resume = OmegaConf.merge(overrides, {"resume_from_checkpoint": True})
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    run(resume, tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", whole)
    strip = ("tokens_per_s", "memory_gib")
    for got, want in zip(metrics_of(tmp_path / "killed"), metrics_of(whole), strict=True):
        assert {k: v for k, v in got.items() if k not in strip} == {
            k: v for k, v in want.items() if k not in strip
        }

    torch.save(base | {"norm.weight": base["norm.weight"] * 2}, tmp_path / "base/consolidated.pth")
    with pytest.raises(SystemExit, match="holds adapters or heads of another model than"):
        run(resume, tmp_path / "other")


def test_a_step_of_lora_is_the_full_step_seen_through_its_adapters(run, uniform):
    """B is 0, so plain SGD moves W by (alpha / rank)^2 dW A'A where a full step moves it by dW."""
    start = {
        "checkpointer": {"checkpoint_dir": str(uniform[0] / "best")},
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 1.0},
        **{"clip_grad_norm": 1e9, "num_warmup_steps": 0, "max_steps": 1, "batch_size": 2},
    }
    base = torch.load(uniform[0] / "best" / "consolidated.pth", weights_only=True)
    full = weights_of(run(start)[0])
    folder, _ = run(start | {"lora": {"rank": 4, "alpha": 6, "targets": ["v_proj"]}})
    adapted = weights_of(folder)
    trunk = load_file(folder / "last" / "adapter_model.safetensors")
    extra = load_file(folder / "last" / "adapter_extra_heads.safetensors")
    of = {
        "layers.0": trunk["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"],
        "layers.1": trunk["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"],
        **{f"extra_heads.{k}": extra[f"heads.{k + 1}.attn.v_proj.lora_a.weight"] for k in range(3)},
    }
    for block, a in of.items():
        key = f"{block}.attention.wv.weight"
        want = (6 / 4) ** 2 * (full[key] - base[key]) @ a.T @ a
        assert (adapted[key] - base[key] - want).norm() < 1e-4 * want.norm() > 0, block
    same = {key for key in base if torch.equal(adapted[key], base[key])}
    assert same == base.keys() - {f"{block}.attention.wv.weight" for block in of}


def test_mistakes_in_lora_come_before_anything_is_built(recipe, run, base_config, uniform):
    """All at once, but those that only the model's widths tell."""
    block = {"rnak": 8, "alpha": 0, "dropout": 1.0, "targets": ["q_proj", "output"]}
    with pytest.raises(ConfigError) as caught:
        recipe.check(OmegaConf.merge(base_config, {"lora": block}))
    for told in (
        "lora.rnak: unknown key (did you mean 'rank'?)",
        "lora.alpha: must be above 0, got 0",
        "lora.dropout: must be below 1, got 1.0",
        "lora.targets[1]: must be one of 'q_proj', 'k_proj', 'v_proj', 'output_proj', 'w1'",
    ):
        assert told in str(caught.value)
    block = {"targets": ["w1", "w1"], "save_adapter_only": True}
    more = {"lora": block, "registry": {"model_name": "mine"}}
    with pytest.raises(ConfigError) as caught:
        recipe.check(OmegaConf.merge(base_config, more))
    for told in (
        "lora: adapters need a trained model below them: set checkpointer, or lora: null",
        "lora.targets: must be some layers, each once, or all-linear, got ['w1', 'w1']",
        "lora.save_adapter_only: registry.model_name registers whole models",
    ):
        assert told in str(caught.value)
    start = {"checkpointer": {"checkpoint_dir": str(uniform[0] / "best")}}
    with pytest.raises(SystemExit, match=r"lora\.quantize_base: q_proj has 32 x 32 weights"):
        run(start | {"lora": {"rank": 4, "quantize_base": True}})


# ------------------------------------------------------------ heads 1 to K - 1 apart

APART = {
    **{"batch_size": 2, "gradient_accumulation_steps": 2, "clip_grad_norm": 0.05},
    **{"optimizer": {"lr": 0.01, "weight_decay": 0.1}, "num_warmup_steps": 1, "max_steps": 4},
}
DISTILLED = {"distill": {"weight": 0.6, "temperature": 1.5}}
WEIGHTINGS = {
    "uniform": {"name": "uniform"},
    "soft": {"name": "rho1", "selection": "soft", "w_max": 2.0, "temperature": 0.5},
    "topk": {"name": "rho1"},
    **{name: {"name": name} for name in ("shuffled", "random_topk", "dft", "top_loss")},
}


@pytest.fixture(scope="module")
def one_head(uniform, tmp_path_factory):
    """Trunk and head 0 of the uniform run's model, as a folder and overrides."""
    folder = tmp_path_factory.mktemp("one_head") / "model"
    shutil.copytree(uniform[0] / "best", folder)
    weights = torch.load(folder / "consolidated.pth", weights_only=True)
    kept = {key: value for key, value in weights.items() if "extra_heads" not in key}
    torch.save(kept, folder / "consolidated.pth")
    params = json.loads((folder / "params.json").read_text())
    params |= {"n_layers": params["n_layers"] - 3, "n_future_tokens": 1}
    (folder / "params.json").write_text(json.dumps(params))
    return {
        "checkpointer": {"checkpoint_dir": str(folder)},
        "model": {"n_future_tokens": 1, "num_layers": 2},
    }


def assert_head_0_is_that_of(got, alone):
    """Every weight of trunk and head 0, to the bit, and what the steps logged of them."""
    mine, want = weights_of(got), weights_of(alone)
    assert set(want) == {key for key in mine if "extra_heads" not in key}
    for key, value in want.items():
        assert torch.equal(mine[key], value), key
    clipped = []
    for one, other in zip(metrics_of(got), metrics_of(alone), strict=True):
        for key in other.keys() & {"grad_norm", "clipped_share", "lr"}:
            assert one[key] == other[key], key
        for key in other.keys() & {"loss_head_0", "val_loss_head_0", "weight_ess_head_0"}:
            assert one[key] == pytest.approx(other[key], rel=1e-6), key  # sums over other shapes
        if "grad_norm" in one:
            clipped += [one["grad_norm"] > 0.05, one["grad_norm_extra_heads"] > 0.05]
    assert clipped == [True] * 8


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("uniform", DISTILLED),  # "soft" is held on two ranks
        pytest.param(
            "uniform",
            {"activation_checkpointing": "full"} | DISTILLED,
            marks=pytest.mark.nightly,
        ),
        *(
            pytest.param(name, more, marks=pytest.mark.nightly)
            for name in ("soft", "topk", "shuffled", "random_topk", "dft", "top_loss")
            for more in ({}, DISTILLED)
        ),
        pytest.param("uniform", {"lora": {"rank": 4}}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_isolated_heads_leave_trunk_and_head_0_to_the_bit(run, rho1, one_head, name, more):
    """As with n_future_tokens 1: under clipping, accumulation, AdamW and every weighting."""
    start = OmegaConf.merge(rho1, APART, {"weighting": WEIGHTINGS[name]})
    alone = {k: v for k, v in more.items() if k != "distill"}
    got, _ = run(OmegaConf.merge(start, more, {"extra_heads": "isolated"}))
    want, _ = run(OmegaConf.merge(start, alone, one_head))
    assert_head_0_is_that_of(got, want)
    before = torch.load(Path(rho1["checkpointer"]["checkpoint_dir"]) / "consolidated.pth")
    for key, value in weights_of(got).items():
        assert "feed_forward" not in key or not torch.equal(value, before[key]), key
    logged = [line for line in metrics_of(got) if "loss" in line]
    assert [f"distill_head_{k}" in logged[-1] for k in range(4)] == [
        k > 0 and "distill" in more for k in range(4)
    ]


def killed_after(step, monkeypatch):
    original = Run._log_step

    def die(self, *args):
        original(self, *args)
        if self.step == step:
            self._states.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_log_step", die)


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.nightly), "bf16"])
def test_only_the_further_heads_train_and_resume_to_the_bit(
    run, uniform, monkeypatch, tmp_path, dtype
):
    """The rest is exported as it was, also in fp32 from a run that computes in bf16."""
    shutil.copytree(uniform[0] / "best", tmp_path / "base")
    overrides = {
        "checkpointer": {"checkpoint_dir": str(tmp_path / "base")},
        **{"extra_heads": "only", "dtype": dtype, "optimizer": {"lr": 0.01}},
        **DISTILLED,
    }
    whole, summary = run(overrides)
    losses = summary["heldout_loss"]
    assert losses["base"][0] == losses["uniform"][0]
    assert all(b < a for a, b in zip(losses["base"][1:], losses["uniform"][1:], strict=True))
    base = torch.load(tmp_path / "base" / "consolidated.pth", weights_only=True)
    for name in ("best", "last"):
        after = torch.load(whole / name / "consolidated.pth", weights_only=True)
        assert {key for key in base if not torch.equal(base[key], after[key])} == {
            key for key in base if key.startswith("extra_heads")
        }
        assert {value.dtype for value in after.values()} == {torch.float32}
    held = FileSystemReader(whole / "training_state/step_000006").read_metadata()
    assert all("heads." in key and "heads.0." not in key for key in held.state_dict_metadata)
    assert sum(key.startswith("model.") for key in held.state_dict_metadata) == 3 * 9

    killed_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(overrides, tmp_path / "killed")
    monkeypatch.undo()
    resume = OmegaConf.merge(overrides, {"resume_from_checkpoint": True})
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    run(resume, tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", whole)
    assert trained(tmp_path / "killed") == trained(whole)

    torch.save(base | {"norm.weight": base["norm.weight"] * 2}, tmp_path / "base/consolidated.pth")
    with pytest.raises(SystemExit, match="holds adapters or heads of another model than"):
        run(resume, tmp_path / "other")


def test_mistakes_about_further_heads_come_before_anything_is_built(
    recipe, run, base_config, uniform, one_head
):
    block = {"distill": {"weight": 0, "temperature": 0}, "extra_heads": "alone"}
    with pytest.raises(ConfigError) as caught:
        recipe.check(OmegaConf.merge(base_config, block))
    for told in (
        "distill.weight: must be above 0, got 0",
        "distill.temperature: must be above 0, got 0",
        "extra_heads: must be one of 'full', 'isolated', 'only'",
    ):
        assert told in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        recipe.check(OmegaConf.merge(base_config, {"extra_heads": "only", "lora": {}}))
    for told in (
        "extra_heads: only trains nothing but heads 1 to K - 1, on a model that is there",
        "extra_heads: only trains these heads whole, and adapters would train the trunk",
    ):
        assert told in str(caught.value)
    more = {"extra_heads": "isolated", "lora": {"heads": False}}
    with pytest.raises(ConfigError, match=r"and lora\.heads: false leaves them as they are"):
        recipe.check(OmegaConf.merge(base_config, more))
    for more, key in (({"extra_heads": "only"}, "extra_heads"), (DISTILLED, "distill")):
        told = f"{key}: the model has n_future_tokens 1, so there are no further heads to train"
        with pytest.raises(SystemExit, match=told):
            run(OmegaConf.merge(one_head, more))


@pytest.mark.slow
def test_a_resumed_run_has_all_that_it_had(run, recipe, check_resumed, tmp_path):
    saves = {"save_every_n_steps": 2, "run_val_every_n_steps": 2}
    cls = recipe.Rho1WMTPRecipeDistributed
    check_resumed(cls, lambda more, folder: run(saves | more, folder), tmp_path / "run")


@pytest.mark.slow
def test_strength_zero_is_plain_mtp(run, rho1, rho1_run):
    """One goes through per-token losses and the reference, the other folds ones in."""
    plain, _ = run(rho1 | {"weighting": {"name": "uniform"}})
    zero, _ = run(OmegaConf.merge(rho1, {"weighting": {"strength": 0.0}}))
    assert_same_weights(zero, plain, tolerance=1e-5)
    for got, want in zip(metrics_of(zero), metrics_of(plain), strict=True):
        for key in want.keys() & {"weighted_loss", "grad_norm"}:  # AdamW forgives a wrong scale
            assert got[key] == pytest.approx(want[key], rel=1e-4)
    with pytest.raises(AssertionError):
        assert_same_weights(rho1_run[0], plain, tolerance=1e-5)


def test_online_reference_equals_the_table(run, rho1, rho1_run):
    online, _ = run(OmegaConf.merge(rho1, {"reference": {"mode": "online"}}))
    for got, want in zip(metrics_of(online), metrics_of(rho1_run[0]), strict=True):
        if "loss" in want:
            assert got["weighted_loss"] == pytest.approx(want["weighted_loss"], rel=1e-5)
            assert got["selected_share"] == pytest.approx(0.6, abs=0.01)


def test_an_mtp_reference_equal_to_the_model_has_no_excess(run, rho1, uniform):
    """All scores are then 0 at the first step but for rounding (packed against alone), and soft
    weights of equal scores are 1; scores of unit spread would give an ESS near 0.4."""
    same = {
        "weighting": {"name": "rho1", "selection": "soft"},
        "reference": rho1["reference"]
        | {
            "checkpointer": {"checkpoint_dir": str(uniform[0] / "best")},
            "table_dir": rho1["reference"]["table_dir"] + "_mtp",
        },
        "max_steps": 1,
        "num_warmup_steps": 0,
    }
    folder, _ = run(rho1 | same)
    assert metrics_of(folder)[-1]["ess"] == pytest.approx(1.0, abs=0.05)


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Held-out rows of which only a part is supervised."""
    source = tmp_path_factory.mktemp("responses") / "val.jsonl"
    text = Path(__file__).read_text()
    rows = [
        {"prompt": text[i : i + 9], "response": text[i + 9 : i + 30]} for i in range(0, 900, 30)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset_val": {"source": str(source)}}


@pytest.fixture(scope="module")
def mtp_reference(uniform, tmp_path_factory):
    """Overrides: a model that knows nothing, and a reference that does but for its head 2."""
    folder = shutil.copytree(uniform[0] / "best", tmp_path_factory.mktemp("mtp") / "reference")
    weights = torch.load(folder / "consolidated.pth", weights_only=True)
    torch.manual_seed(0)
    for key in [key for key in weights if key.startswith("extra_heads.1.") and "norm" not in key]:
        weights[key] = torch.randn_like(weights[key])
    torch.save(weights, folder / "consolidated.pth")
    return {
        "weighting": {"name": "rho1", "selection": "topk", "ratio": 0.6},
        "reference": {
            "mode": "cached",
            "checkpointer": {"checkpoint_dir": str(folder)},
            "table_dir": str(folder.parent / "scores"),
            "batch_tokens": 256,
        },
    }


def plain_heldout(cfg, folder, *, K):
    """The mean over each head's targets, row by row, unpacked and without any of our shifts."""
    rows = rows_dataset(
        llama2_tokenizer(cfg.tokenizer.path, max_seq_len=64), source=cfg.dataset_val.source
    )
    model = references.load_reference(
        folder,
        tokenizer_path=cfg.tokenizer.path,
        max_seq_len=64,
        n_future_tokens=K,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    total, targets = [0.0] * K, [0] * K
    for row in rows:
        log_p = model(torch.tensor([row["tokens"]]))[0].log_softmax(-1).double()
        for u in range(1, len(row["tokens"])):
            for k in range(min(K, u) if row["keep"][u] else 0):
                # A next-token reference gives every head what it says one token before.
                ahead = k if model.n_future_tokens > 1 else 0
                total[k] -= log_p[u - ahead - 1, ahead, row["tokens"][u]].item()
                targets[k] += 1
    assert min(targets) > 0
    return [x / n for x, n in zip(total, targets, strict=True)]


@pytest.mark.parametrize("mode", ["cached", "online"])
@pytest.mark.parametrize("kind", ["next-token", "mtp"])
def test_the_reference_stands_beside_the_model(
    run, rho1, mtp_reference, responses, base_config, caplog, kind, mode
):
    """Held-out loss per head of both, at the start and in summary.json, and what it means."""
    caplog.set_level("INFO")
    own = rho1 if kind == "next-token" else mtp_reference
    own = OmegaConf.merge(own, responses, {"max_steps": 1, "reference": {"mode": mode}})
    folder, summary = run(own)
    known, cfg = summary["reference"], OmegaConf.merge(base_config, own)
    assert json.loads((folder / "summary.json").read_text())["reference"] == known
    assert known["kind"] == kind
    assert known["heads"] == {"next-token": 1, "mtp": 4}[kind]
    plain = plain_heldout(cfg, own.reference.checkpointer.checkpoint_dir, K=4)
    assert known["heldout_loss"] == pytest.approx(plain, rel=1e-5)
    assert known["model_heldout_loss"] == summary["heldout_loss"]["base"]
    if kind == "next-token":
        start = plain_heldout(cfg, cfg.checkpointer.checkpoint_dir, K=4)
        assert known["model_heldout_loss"] == pytest.approx(start, rel=1e-5)

    said = [r.getMessage() for r in caplog.records]
    (table,) = (text for text in said if text.startswith("Held-out loss per head before training"))
    heads, *lines = table.splitlines()[1:]
    assert heads.split() == ["head", "0", "head", "1", "head", "2", "head", "3"]
    for line, name, key in zip(
        lines, ("reference", "model"), ("heldout_loss", "model_heldout_loss"), strict=True
    ):
        assert line.split() == [name, *(f"{loss:.3f}" for loss in known[key])]
    before_training = [i for i, text in enumerate(said) if text.startswith("The data are")]
    assert said.index(table) > before_training[0]
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    warned = [text for text in warned if "of the reference is not below" in text]
    notes = [text for text in said if "tells heads 1 to 3 to learn what they cannot know" in text]
    if kind == "mtp":
        assert known["not_below"] == [2]
        assert [text[:6] for text in warned] == ["Head 2"]
        assert notes == []
    else:
        assert warned == []
        assert len(notes) == 1


def test_a_run_without_reference_has_none_to_compare(run, uniform, rho1, caplog):
    caplog.set_level("INFO")
    _, summary = run(rho1 | {"weighting": {"name": "uniform"}, "max_steps": 1})
    assert "reference" not in summary
    assert "reference" not in uniform[1]
    assert "before training" not in caplog.text


def test_a_finished_run_keeps_the_comparison(run, rho1, rho1_run, tmp_path):
    """Complete, or killed before its summary: the figures are those of the start."""
    folder = shutil.copytree(rho1_run[0], tmp_path / "run")
    again = {"resume_from_checkpoint": True}
    assert run(rho1 | again, folder)[1]["reference"] == rho1_run[1]["reference"]
    (folder / "summary.json").unlink()
    _, summary = run(rho1 | again, folder)
    assert summary["reference"] == rho1_run[1]["reference"]
    written = json.loads((folder / "summary.json").read_text())
    assert written["reference"] == rho1_run[1]["reference"]


@pytest.mark.parametrize("name", ["random_topk", "shuffled", "dft", "top_loss", "oracle"])
def test_every_control_runs_and_keeps_the_mean_weight_at_one(run, rho1, name):
    short = {"weighting": {"name": name}, "max_steps": 2, "num_warmup_steps": 1}
    folder, summary = run(OmegaConf.merge(rho1, short))
    line = metrics_of(folder)[-1]
    assert [line[f"weight_mean_head_{k}"] for k in range(4)] == pytest.approx([1.0] * 4, abs=1e-4)
    assert line["ess"] < 1
    assert name in summary["heldout_loss"]
    share = summary["corrupted_share"]
    assert 0 < share["data"] < 1
    assert (share["selected"] == 0) == (name == "oracle")
    assert ("reference" in summary) == (name == "shuffled")  # which permutes real scores


def test_clipping_schedule_and_decay_reach_the_update(run, uniform):
    """Plain SGD moves by rate times clipped gradient: nothing at the first of these steps, whose
    rate is 0, and rate times the bound at the second. Decayed to nothing, heads 1 to 3 stay."""
    start = uniform[0] / "best"
    folder, _ = run(
        {
            "checkpointer": {"checkpoint_dir": str(start)},
            "weighting": {"name": "uniform", "decay": 1e-12},
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 10.0},
            "clip_grad_norm": 0.01,
            "num_warmup_steps": 1,
            "max_steps": 2,
        }
    )
    steps = [line for line in metrics_of(folder) if "loss" in line]
    assert [line["lr"] for line in steps] == [0.0, 10.0]
    assert all(line["grad_norm"] > 0.1 for line in steps)
    assert all(line["weighted_loss"] == pytest.approx(line["loss_head_0"]) for line in steps)
    before = torch.load(start / "consolidated.pth", weights_only=True)
    moved = {key: (value - before[key]).norm() for key, value in weights_of(folder).items()}
    assert torch.stack([*moved.values()]).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert all((norm < 1e-6) == key.startswith("extra_heads.") for key, norm in moved.items())


@pytest.mark.slow
def test_epochs_padding_and_clipped_steps_are_told(run, uniform, monkeypatch, caplog, capsys):
    """Ten steps of 40 packs, an epoch has three; every fourth step is logged."""
    norms = [line["grad_norm"] for line in metrics_of(uniform[0]) if "loss" in line]
    bound, end_step, add = sorted(norms)[2], Run.end_step, Throughput.add
    runs, rows, tokens, clipped = [], [], [], []

    def noting(self, sums, stats, grad_norm, lr):
        runs.append(self)
        rows.append((sum((row_BT >= 0).sum() for row_BT in self._rows), self._epoch))
        clipped.append(float(grad_norm) > bound)
        end_step(self, sums, stats, grad_norm, lr)

    monkeypatch.setattr(Run, "end_step", noting)
    monkeypatch.setattr(Throughput, "add", lambda self, n: (tokens.append(n), add(self, n)))
    more = {"max_steps": 10, "batch_size": 40, "log_every_n_steps": 4, "clip_grad_norm": bound}
    with caplog.at_level("INFO"):
        folder, summary = run(more)
    data = runs[0]._dataset
    assert [int(n) for n in tokens] == [int(n) for n, _ in rows]
    said = f"The data are {data.n_tokens:,} tokens in {len(data)} packs of 64, "
    assert re.search(rf"{said}.* a step 40: 10 steps are 3\.3 epochs", caplog.text)
    assert "more than 4 epochs" not in caplog.text
    assert f"tok/s pad {data.padding_share:.1%} " in capsys.readouterr().err

    assert 0 < sum(clipped) < 10
    lines = {line["step"]: line for line in metrics_of(folder)}
    shares = {step: line["clipped_share"] for step, line in lines.items() if "loss" in line}
    assert shares == {4: sum(clipped[:4]) / 4, 8: sum(clipped[4:8]) / 4}
    assert summary["clipped_share"] == sum(clipped) / 10
    epochs = [epoch for _, epoch in rows]
    begins = [step for step, epoch in enumerate(epochs, 1) if epochs.index(epoch) + 1 == step]
    assert [step for step, line in lines.items() if "epoch" in line] == begins
    assert [lines[step]["epoch"] for step in begins] == [0, 1, 2, 3]
    for step in {*begins, *shares}:
        assert lines[step]["padding_share"] == data.padding_share < 0.1


def test_a_state_of_another_packing_is_refused(run, uniform, monkeypatch, tmp_path):
    """Its place in the data would be another one, silently."""
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    monkeypatch.setattr(
        packing, "best_fit_decreasing", lambda lengths, room: lengths.cumsum() // room
    )
    with pytest.raises(SystemExit, match=r"step_000006 was saved by a version that packs rows"):
        run({"max_steps": 8, "resume_from_checkpoint": True}, folder)


def test_the_rate_follows_the_schedule(uniform):
    cosine = [0.003 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    rates = [line["lr"] for line in metrics_of(uniform[0]) if "lr" in line]
    assert rates == pytest.approx([0.0, 0.0015, *cosine])


def test_a_longer_run_goes_on_with_its_own_schedule(run, uniform, tmp_path, caplog):
    """The shorter one had ended at a rate of 0; the new one says so."""
    caplog.set_level("INFO")
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    longer = {"max_steps": 8, "resume_from_checkpoint": True, "compile": False}
    _, summary = run(longer, folder)
    assert summary["steps"] == 8
    rates = [line["lr"] for line in metrics_of(folder) if "lr" in line]
    cosine = [0.003 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in (4, 5)]
    assert rates[6:] == pytest.approx(cosine)
    assert "max_steps was 6 and is 8: the run gets longer, its schedule ends at" in caplog.text
    assert f"the learning rate goes on at {cosine[0]:.3g} instead of 0." in caplog.text


@pytest.mark.slow
def test_a_stop_between_two_micro_steps_loses_and_repeats_nothing(
    run, rho1, stops, monkeypatch, tmp_path
):
    """What the half step has read is read again: the state is that of the last whole step.

    The run that stops gathers parameters and reduces gradients once a step, which changes no bit;
    at the stop its parameters are gathered.
    """
    more = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    overrides = OmegaConf.merge(rho1, more, {"weighting": {"name": "shuffled"}})
    whole, _ = run(overrides, tmp_path / "whole")
    answers = iter([None] * 5 + ["SIGUSR1"])
    monkeypatch.setattr(stops, "agreed", lambda: next(answers))
    with pytest.raises(Stopped) as stopped:
        run(OmegaConf.merge(overrides, {"sync_each_batch": False}), tmp_path / "run")
    assert (stopped.value.reason, stopped.value.step) == ("SIGUSR1", 2)
    monkeypatch.undo()
    run(OmegaConf.merge(overrides, {"resume_from_checkpoint": True}), tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole)
    assert trained(tmp_path / "run") == trained(whole)


def test_a_run_that_ended_but_for_its_export(run, uniform, tmp_path):
    """Killed after the last state: nothing is left to train, ``last/`` and the summary are."""
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    shutil.rmtree(folder / "last")
    (folder / "summary.json").unlink()
    _, summary = run({"resume_from_checkpoint": True}, folder)
    assert_same_weights(folder, uniform[0])
    assert summary["heldout_loss"] == uniform[1]["heldout_loss"]
    assert summary["acceptance"] == uniform[1]["acceptance"]


def test_a_state_from_before_acceptance_was_counted(run, tmp_path, monkeypatch):
    state_dict = Run.state_dict

    def older(self):
        state = state_dict(self)
        del state["acceptance"]
        return state

    monkeypatch.setattr(Run, "state_dict", older)
    often = {"save_every_n_steps": 2, "run_val_every_n_steps": 2}
    _, before = run(often | {"max_steps": 2}, tmp_path / "run")
    monkeypatch.undo()
    _, summary = run(often | {"max_steps": 4, "resume_from_checkpoint": True}, tmp_path / "run")
    assert summary["heldout_loss"]["base"] == before["heldout_loss"]["base"]
    assert summary["tokens_per_forward"].keys() == summary["acceptance"].keys() == {"uniform"}


def test_a_run_that_starts_over_leaves_no_state_of_the_one_before(run, uniform, tmp_path):
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    run({"max_steps": 2, "save_every_n_steps": 2}, folder)
    assert [path.name for path in (folder / "training_state").iterdir()] == ["step_000002"]
    assert "Complete after 2 steps." in (folder / "run.html").read_text()
    assert json.loads((folder / "tokens.json").read_text())["step"] == 2


def test_a_run_on_data_that_has_changed(run, uniform, base_config, tmp_path):
    """The config names the same file."""
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    source = Path(base_config.dataset.source)
    content = source.read_text()
    try:
        source.write_text(content + json.dumps({"text": "one more"}) + "\n")
        with pytest.raises(SystemExit, match="was trained on other data"):
            run({"max_steps": 8, "resume_from_checkpoint": True}, folder)
    finally:
        source.write_text(content)


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_soon(run, recipe, monkeypatch, tmp_path):
    """Not only at the next save, which may be hours away."""
    publish = TrainingStates._publish

    def full(self, partial, *args):
        if partial.name == "step_000030.partial":
            raise OSError("no room")
        publish(self, partial, *args)

    monkeypatch.setattr(TrainingStates, "_publish", full)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"OSError: .*step_000030 could not be written .*no room"):
        run({"max_steps": 60, "save_every_n_steps": 30, "run_val_every_n_steps": 60}, folder)
    assert 30 <= metrics_of(folder)[-1]["step"] < 60


def test_a_run_cut_short_to_the_step_of_its_state(run, uniform, tmp_path, caplog):
    """It says so. Its last held-out loss would be that of an earlier step, or of none."""
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    seldom = {"save_every_n_steps": 2, "run_val_every_n_steps": 5, "keep_last": 9}
    whole, _ = run(seldom | {"max_steps": 6}, folder)
    for path in (whole / "training_state").iterdir():
        if path.name > "step_000002":
            shutil.rmtree(path)
    _, summary = run(seldom | {"max_steps": 2, "resume_from_checkpoint": True}, folder)
    assert "after step 2. max_steps was 6 and is 2: the run gets shorter, its" in caplog.text
    last = [line for line in metrics_of(folder) if "val_loss" in line][-1]
    assert last["step"] == summary["steps"] == 2
    assert summary["heldout_loss"]["uniform"] == [last[f"val_loss_head_{k}"] for k in range(4)]
    assert summary["tokens_per_forward"]["uniform"] == last["tokens_per_forward"]


def test_a_complete_run_without_states_is_not_started_over(run, uniform, tmp_path):
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    shutil.rmtree(folder / "training_state")
    before = (folder / "summary.json").read_text()
    with pytest.raises(SystemExit, match=r"holds a run that is complete.*take another output_dir"):
        run({"max_steps": 8, "resume_from_checkpoint": True}, folder)
    assert (folder / "summary.json").read_text() == before


def test_an_interrupted_run_is_refused_before_its_controls_are_made(main, tmp_path):
    (tmp_path / "training_state" / "step_000002").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds a run that was interrupted after step 2 or later"):
        main({"output_dir": str(tmp_path), "controls": ["random_topk"]})
    assert [path.name for path in tmp_path.iterdir()] == ["training_state"]


def test_a_replay_of_nothing(run, main, tmp_path):
    with pytest.raises(
        SystemExit, match=r"ValueError: replay: .*none holds no state, name a run's"
    ):
        main({"replay": str(tmp_path / "none")})


def test_a_run_resumed_under_another_config(run, uniform, tmp_path):
    """Before anything is loaded: of another shape, the state would not fit."""
    folder = shutil.copytree(uniform[0], tmp_path / "run")
    other = {"resume_from_checkpoint": True, "optimizer": {"lr": 0.1}, "model": {"embed_dim": 64}}
    message = r"ValueError: .*model.embed_dim was 32 and is 64; optimizer.lr was 0.003 and is 0.1"
    with pytest.raises(SystemExit, match=message):
        run(other, folder)
    with pytest.raises(SystemExit, match="has 6 steps done, more than max_steps 4"):
        run({"resume_from_checkpoint": True, "max_steps": 4}, folder)
    assert (folder / "training_state" / "step_000006").exists()
    assert (folder / "summary.json").exists()


@pytest.fixture(scope="module")
def diverged(run, tmp_path_factory):
    """At this rate the first update ruins the model; from step 2 on no loss is a number."""
    folder = tmp_path_factory.mktemp("diverged") / "run"
    overrides = {
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e30},
        "num_warmup_steps": 0,
        "run_val_every_n_steps": 6,
        "save_every_n_steps": 1,
        "max_skipped_steps": 2,
    }
    with pytest.raises(SystemExit) as end:
        run(overrides, folder)
    return folder, overrides, str(end.value)


def test_a_diverging_run_stops_and_keeps_what_was_saved_before(diverged):
    folder, _, sentence = diverged
    assert re.match(r"TrainingError: the loss is (nan|inf) in step 3, and the run stops", sentence)
    assert f"--config {folder}/config.yaml replay={folder}/bad_step" in sentence
    assert [path.name for path in (folder / "training_state").iterdir()] == ["step_000001"]
    assert [line["step"] for line in metrics_of(folder) if "loss" in line] == [1, 2]
    assert not (folder / "summary.json").exists()


def test_a_stop_within_a_row_of_skipped_steps_keeps_what_was_before(
    run, diverged, stops, monkeypatch, tmp_path
):
    """Its own state holds the ruined parameters."""
    answers = iter([None, None, "SIGTERM"])
    monkeypatch.setattr(stops, "agreed", lambda: next(answers))
    with pytest.raises(Stopped):
        run(diverged[1] | {"keep_last": 1}, tmp_path)
    found = sorted(path.name for path in (tmp_path / "training_state").iterdir())
    assert found == ["step_000001", "step_000002"]


def test_a_full_disk_does_not_hide_why_a_run_stopped(run, diverged, recipe, monkeypatch, tmp_path):
    publish = TrainingStates._publish

    def full(self, partial, *args):
        if partial.parent.name == "bad_step":
            raise OSError("no room")
        publish(self, partial, *args)

    monkeypatch.setattr(TrainingStates, "_publish", full)
    with pytest.raises(SystemExit) as end:
        run(diverged[1], tmp_path)
    assert re.match(r"TrainingError: the loss is (nan|inf) in step 3, and the run", str(end.value))
    assert re.search(r"A replay is not possible: .*bad_step/step_.*no room", str(end.value))


def test_skipped_steps_name_their_rows(diverged, base_config):
    folder, _, _ = diverged
    lines = (folder / "skipped_steps.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [2, 3]
    rows = rows_dataset(
        llama2_tokenizer(base_config.tokenizer.path, max_seq_len=64),
        source=base_config.dataset.source,
    )
    packs = PackedDataset(rows, max_seq_len=64, seed=base_config.seed)
    for step, packed in zip(steps, (range(4, 8), range(8, 12)), strict=True):
        expected = {row for i in packed for row in packs[i]["row"].tolist()} - {-1}
        assert step["rows"] == [[sorted(expected)]]


def test_a_stopped_step_is_replayed(diverged, main, capsys):
    """The state is from before the step: its own rows, and the first module that fails."""
    folder, overrides, _ = diverged
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(overrides | {"output_dir": str(folder), "replay": str(folder / "bad_step")})
    printed = capsys.readouterr().out
    assert "Replay of step 3" in printed
    last = json.loads((folder / "skipped_steps.jsonl").read_text().splitlines()[-1])
    first_rows = ", ".join(map(str, last["rows"][0][0][:8]))
    assert f"rank 0, micro-batch 1: rows {first_rows}" in printed
    assert re.search(r"losses that are not finite in rows \d", printed)
    assert re.search(r"first output that is not finite: \w", printed)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_no_number_changes_nothing(run, recipe, uniform, monkeypatch, fused):
    """One NaN at step 4 of 6: parameters and moments stay, the run goes on and ends well.

    A fused optimizer has been called by the time that anybody knows.
    """
    original = recipe.Rho1WMTPRecipeDistributed._loss_step
    seen = []

    def broken(self, batch):
        if self._run.step in (3, 4):
            moments = [x for one in self._optimizer.state.values() for x in one.values()]
            seen.append([x.detach().clone() for x in (*self._model.parameters(), *moments)])
        loss, sums, stats = original(self, batch)
        if self._run.step == 3:
            loss = loss * torch.nan
        return loss, sums | {"objective": loss.detach()}, stats

    monkeypatch.setattr(recipe.Rho1WMTPRecipeDistributed, "_loss_step", broken)
    folder, summary = run({"max_skipped_steps": 2, "optimizer": {"fused": fused}})
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert len(seen[0]) == 4 * sum(1 for _ in weights_of(folder))  # each has three more
    assert summary["steps"] == 6
    assert math.isfinite(sum(summary["heldout_loss"]["uniform"]))
    (step,) = map(json.loads, (folder / "skipped_steps.jsonl").read_text().splitlines())
    assert (step["step"], step["reason"]) == (4, "the loss is nan")
    line = next(line for line in metrics_of(folder) if line["step"] == 4)
    assert line["skipped_steps"] == 1
    assert not (uniform[0] / "skipped_steps.jsonl").exists()


def test_a_loss_spike_is_written_down(run, recipe, monkeypatch):
    original = recipe.Rho1WMTPRecipeDistributed._loss_step

    def spiked(self, batch):
        loss, sums, stats = original(self, batch)
        return loss, sums | {"loss_K": sums["loss_K"] * (3 if self._run.step == 19 else 1)}, stats

    monkeypatch.setattr(recipe.Rho1WMTPRecipeDistributed, "_loss_step", spiked)
    folder, _ = run({"max_steps": 22, "run_val_every_n_steps": 22, "save_every_n_steps": 22})
    (spike,) = map(json.loads, (folder / "loss_spikes.jsonl").read_text().splitlines())
    assert spike["step"] == 20
    assert spike["loss"] > 2 * spike["mean_before"]
    assert len(spike["rows"][0][0]) > 4


def test_an_online_reference_that_gives_no_number(run, recipe, rho1, monkeypatch):
    """On held-out text it is found before training, else in the step."""
    original, start = references.reference_losses, Run.start_steps
    online = OmegaConf.merge(rho1, {"reference": {"mode": "online"}})

    def broken(model, tokens_BT, doc_BT, **inputs):
        q_BT = original(model, tokens_BT, doc_BT, **inputs)
        q_BT[0, 5] = torch.inf
        return q_BT

    def break_then_start(self):
        monkeypatch.setattr(references, "reference_losses", broken)
        start(self)

    monkeypatch.setattr(Run, "start_steps", break_then_start)
    with pytest.raises(SystemExit, match="TrainingError: the reference loss is inf in step 1"):
        run(online)
    with pytest.raises(SystemExit, match=r"TrainingError: the held-out .* of the reference .*inf"):
        run(online)


def test_heldout_text_too_short_for_the_heads(run, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(SystemExit, match="TrainingError: no held-out text is long enough for head"):
        run({"dataset_val": {"source": str(tmp_path / "short.jsonl")}})


@pytest.fixture
def main(recipe, one_process, base_config, monkeypatch):
    """main(overrides): ``recipe_main`` of a config, in the group of this process."""
    monkeypatch.setattr(start, "init_process_group", lambda *_: one_process)
    monkeypatch.setattr(start.dist, "destroy_process_group", lambda: None)
    return lambda overrides: recipe.recipe_main.__wrapped__(OmegaConf.merge(base_config, overrides))


def test_a_finished_comparison_is_not_made_again(main, recipe, tmp_path, monkeypatch, capsys):
    overrides = {
        "output_dir": str(tmp_path / "out"),
        "controls": ["random_topk"],
        "max_steps": 3,
        "resume_from_checkpoint": True,
    }
    main(overrides)
    first = json.loads((tmp_path / "out" / "summary.json").read_text())
    control = tmp_path / "out" / "controls" / "random_topk"
    assert list(first["heldout_loss"]) == ["base", "random_topk", "uniform"]
    seconds = json.loads((control / "summary.json").read_text())["seconds"]
    assert first["seconds"] == pytest.approx(seconds + first["run_seconds"])
    monkeypatch.setattr(recipe.Rho1WMTPRecipeDistributed, "setup", lambda self: 1 / 0)
    main(overrides)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == first
    _, one, two = capsys.readouterr().out.split("Held-out loss per head")
    assert one.split() == two.split()


@pytest.mark.slow
def test_controls_under_overrides_stand_everywhere_under_their_names(
    main, recipe, rho1, reference, tmp_path, monkeypatch, capsys
):
    """Another number of steps, another reference; then one of them changes."""
    drawn = []
    monkeypatch.setattr(recipe, "plot_curves", lambda by, png: drawn.append([*by]))
    sets = {
        "uniform": {"max_steps": 4},
        "own_reference": {
            "reference.checkpointer.checkpoint_dir": str(reference[0] / "best"),
            "reference.table_dir": str(tmp_path / "scores"),
        },
    }
    overrides = rho1 | {
        "output_dir": str(tmp_path / "out"),
        "controls": sets,
        "max_steps": 2,
        "resume_from_checkpoint": True,
    }
    main(overrides)
    names = ["uniform", "own_reference", "rho1"]
    first = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(first["heldout_loss"]) == ["base", *names]
    assert first["steps"] == 2
    longer = {"weighting.name": "uniform", "max_steps": 4}
    assert first["controls"] == {"uniform": longer, "own_reference": sets["own_reference"]}
    assert drawn == [names[:1], names[:2], names]
    folder = tmp_path / "out" / "controls"
    found = OmegaConf.load(folder / "uniform" / "config.yaml")
    assert (found.max_steps, found.weighting.name) == (4, "uniform")
    assert found.control == {"name": "uniform", "overrides": longer}
    assert metrics_of(folder / "uniform")[-1]["step"] == 4
    assert metrics_of(folder / "own_reference")[0] == metrics_of(tmp_path / "out")[0]  # one start
    assert (tmp_path / "scores").exists()
    out = capsys.readouterr().out
    assert re.search(r"uniform .* weighting.name=uniform  max_steps=4$", out, re.MULTILINE)

    setup, made = recipe.Rho1WMTPRecipeDistributed.setup, []
    noting = lambda self: (made.append(self._cfg.output_dir), setup(self))  # noqa: E731
    monkeypatch.setattr(recipe.Rho1WMTPRecipeDistributed, "setup", noting)
    main(overrides)
    assert made == []
    longer = {"uniform": {"max_steps": 5}}
    main(overrides | {"controls": sets | longer})  # goes on; the run has another picture
    assert made == [str(folder / "uniform"), str(tmp_path / "out")]
    assert metrics_of(folder / "uniform")[-1]["step"] == 5
    other = {"uniform": {"max_steps": 5, "optimizer.lr": 0.1}}
    with pytest.raises(SystemExit, match=r"another config \(optimizer.lr was 0.003 and is 0.1\)"):
        main(overrides | {"controls": sets | other})


def test_an_oracle_without_marks_is_refused_before_the_runs_before_it(
    main, run, base_config, tmp_path
):
    rows = [json.loads(line) for line in Path(base_config.dataset.source).read_text().splitlines()]
    message = "ValueError: weighting oracle needs rows with a `noise` field.*no row of dataset has"
    for name, noise in {"none": {}, "empty": {"noise": []}}.items():
        texts = [{"text": row["text"]} | noise for row in rows]
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in texts))
        changes = {"dataset": {"source": str(source)}, "output_dir": str(tmp_path / name)}
        with pytest.raises(SystemExit, match=message):
            main(changes | {"controls": ["uniform", "oracle"]})
        assert not (tmp_path / name / "controls").exists()
    with pytest.raises(SystemExit, match=message):
        run(changes | {"weighting": {"name": "oracle"}})
    with pytest.raises(SystemExit, match="none there"):
        main({"controls": ["dft", {"a": {"dataset.source": "none there"}}]})


def test_weights_that_the_data_bring(main, run, base_config, tmp_path):
    rows = [json.loads(line) for line in Path(base_config.dataset.source).read_text().splitlines()]
    source = tmp_path / "weighted.jsonl"
    spans = [{"text": row["text"], "score": [[0, 4, 0.0], [4, 8, 2.0]]} for row in rows]
    source.write_text("".join(json.dumps(row) + "\n" for row in spans))
    weighting = {"weighting": {"name": "column", "w_min": 0.0}}
    named = {"source": str(source), "columns": {"weight": "score"}}
    folder, _ = run(weighting | {"dataset": named, "max_steps": 2})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0.2 < line["ess"] < 0.95 for line in lines if "ess" in line)
    assert any("ess" in line for line in lines)
    message = "ValueError: weighting column needs rows with a `weight` field.*no row of dataset has"
    with pytest.raises(SystemExit, match=message):
        run(weighting | {"max_steps": 2})
    with pytest.raises(SystemExit, match=message):
        main({"controls": ["uniform", "column"], "output_dir": str(tmp_path / "out")})


def test_a_control_that_cannot_be_is_refused_before_anything_is_built(recipe, base_config, rho1):
    other = {"reference.checkpointer.checkpoint_dir": "elsewhere"}
    online = {"reference.mode": "online"}
    for sets, message in (
        ({"a": {"max_stps": 3}}, r"^controls\.a\.max_stps: unknown key \(did you mean 'max_steps'"),
        (
            {"a": {"weighting.rato": 3}},
            r"^controls\.a\.weighting\.rato: unknown key \(did you mean 'ra",
        ),
        ({"a": {"weighting.ratio": 3}}, r"^controls\.a\.weighting\.ratio must be above 0"),
        ({"a": {"max_steps": 0}}, r"^controls\.a\.max_steps: must be at least 1, got 0"),
        ({"a": {"weighting": None}}, r"^controls\.a\.weighting: must be a block of keys, got null"),
        ({"a": {"optimizer.betas.x": 1}}, r"^controls\.a\.optimizer\.betas: must be"),
        (
            {"a": {"reference": None}},
            r"^controls\.a\.reference: missing, the weighting 'rho1' needs",
        ),
        ({"unifrom": None}, r"^controls\.unifrom\.weighting\.name 'unifrom' is not one of"),
        ({"critic": {"max_steps": 3}, "b": {"sed": 3}}, r"^controls\.b\.sed: unknown key"),
        (
            {"a": {"max_steps": 0}, "b": {"sed": 3}},
            r"^2 errors\n  controls\.a\..*\n  controls\.b\.",
        ),
        ({"a": {"max_steps": "???"}}, r"^controls\.a\.max_steps: must be given a value"),
        ({"a": {"seed": 3}}, r"^controls\.a\.seed: no control may change it"),
        ({3: None}, r"^controls\.3: a key must be text"),
        (3, r"^controls: must be a list or a block of keys, got 3"),
        (
            {"a": other},
            r"^controls\.a\.reference\.table_dir: .* is another run's as well, with anoth",
        ),
        (
            {"a": {"dataset.source": "x"}, "b": other | online},
            r"^controls\.a\.reference\.table_dir",
        ),
        (
            {"a": other, "b": {"sed": 3}},
            r"^2 errors\n  controls\.b\.sed.*\n  controls\.a\.reference\.table_dir",
        ),
    ):
        check_error(recipe, base_config, rho1 | {"controls": sets}, message)
    fine = {"a": other | online, "b": other | {"reference.table_dir": "x"}, "c": {"max_steps": 3}}
    recipe.check(OmegaConf.merge(base_config, rho1, {"controls": fine | {"uniform": other}}))


def test_what_fails_before_the_run_is_one_sentence(main, tmp_path):
    with pytest.raises(SystemExit, match=r"ConfigError: requires: .*none.yaml cannot be read"):
        main({"requires": [str(tmp_path / "none.yaml")]})
    with pytest.raises(SystemExit, match="ConfigError: requires: must be a list"):
        main({"requires": 3})
    (tmp_path / "mine.txt").touch()
    prepare = {
        "_component_": "wmtp_modules.quickstarts.stdlib.prepare_stdlib",
        "assets_dir": str(tmp_path),
        "vocab_size": 400,
        "corrupted_share": 0.4,
        "seed": 0,
    }
    with pytest.raises(SystemExit, match=r"ValueError: .* holds files that the quickstart did not"):
        main({"prepare": prepare})


def rank_main(rank, scenario, cfg, folder):
    """One of some ranks, which tests start with ``forks.call``; the scenario by its name."""
    torch.set_num_threads(1)
    recipe, place = import_recipe(), (*init_process_group("cpu"), StopRequests(), {})
    globals()[scenario](recipe, place, cfg, Path(folder))
    patient_barrier()
    dist.destroy_process_group()


def killed(recipe, place, cfg, folder):
    """A run, and the same run killed after step 5."""
    recipe.train_one(OmegaConf.merge(cfg, {"output_dir": str(folder / "whole")}), *place)
    cfg = OmegaConf.merge(cfg, {"output_dir": str(folder / "killed")})
    original = Run._log_step

    def die(self, *args):
        original(self, *args)
        if self.step == 5:
            self._states.wait()
            raise KeyboardInterrupt

    Run._log_step = die
    with pytest.raises(KeyboardInterrupt):
        recipe.train_one(cfg, *place)
    Run._log_step = original
    return cfg


def killed_and_resumed(recipe, place, cfg, folder):
    cfg = killed(recipe, place, cfg, folder)
    patient_barrier()
    recipe.train_one(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), *place)


def heads_apart(recipe, place, cfgs, folder):
    """Isolated heads beside a trunk, that trunk without them, and these heads alone, twice."""
    isolated, alone, only = cfgs
    for name, cfg in {"isolated": isolated, "alone": alone}.items():
        recipe.train_one(OmegaConf.merge(cfg, {"output_dir": str(folder / name)}), *place)
    killed_and_resumed(recipe, place, only, folder)


def odd_batches(recipe, place, cfg, folder):
    """At step 2 rank 1 has nothing to learn from, at step 3 nobody; then rank 1 has NaNs: at step 4
    in its gradient, at step 5 in its loss."""
    original = recipe.Rho1WMTPRecipeDistributed._loss_step

    def odd(self, batch):
        if (self._rank, self._run.step) in [(1, 1), (0, 2), (1, 2)]:
            batch["keep"].zero_()
        loss, sums, stats = original(self, batch)
        if (self._rank, self._run.step) == (1, 3):
            loss = loss * torch.nan
        if (self._rank, self._run.step) == (1, 4):
            sums = sums | {"objective": sums["objective"] * torch.nan}
        return loss, sums, stats

    recipe.Rho1WMTPRecipeDistributed._loss_step = odd
    recipe.train_one(OmegaConf.merge(cfg, {"output_dir": str(folder / "odd")}), *place)


def hung_scorer(recipe, place, cfg, folder):
    """Rank 0 never comes to the end of its first batch; rank 1 has none."""
    if dist.get_rank() == 0:
        references.score_rows = lambda *_: time.sleep(600)
    recipe.train_one(OmegaConf.merge(cfg, {"output_dir": str(folder / "hung")}), *place)


@pytest.mark.slow
def test_a_rank_that_hangs_while_scoring_ends_the_run(forks, rho1, base_config, tmp_path):
    """The others would wait for it for days."""
    table = {"table_dir": str(tmp_path / "scores")}
    cfg = OmegaConf.merge(base_config, rho1, {"reference": table, "collective_timeout_s": 5})
    with pytest.raises(AssertionError, match="hangs: it came to scoring"):
        forks.call(rank_main, "hung_scorer", cfg, tmp_path)
    ended = json.loads((tmp_path / "hung" / "exit.json").read_text())
    assert (ended["reason"], ended["ranks"], ended["collective"]) == ("hung", [0], "barrier")


def trained(folder):
    strip = ("tokens_per_s", "memory_gib")
    return [{k: v for k, v in line.items() if k not in strip} for line in metrics_of(folder)]


@pytest.mark.slow
def test_two_ranks_resume_to_the_bit(forks, rho1, base_config, tmp_path):
    table = {"table_dir": str(tmp_path / "scores")}
    more = rho1 | {"max_steps": 6, "save_every_n_steps": 4, "batch_size": 8}
    cfg = OmegaConf.merge(base_config, more, {"reference": table})
    forks.call(rank_main, "killed_and_resumed", cfg, tmp_path)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")


@pytest.mark.slow
def test_heads_apart_on_two_ranks(forks, run, rho1, one_head, base_config, tmp_path):
    """Bits of trunk and head 0; heads alone resume to the bit, and train as on one rank."""
    table = {"reference": {"table_dir": str(tmp_path / "scores")}}
    start = OmegaConf.merge(base_config, rho1, APART, table, {"weighting": WEIGHTINGS["soft"]})
    isolated = OmegaConf.merge(start, DISTILLED, {"extra_heads": "isolated"})
    apart = {key: rho1[key] for key in ("checkpointer",)} | APART | DISTILLED
    apart |= {"extra_heads": "only", "max_steps": 6, "weighting": {"name": "dft"}}
    both = OmegaConf.merge(base_config, apart)
    cfgs = isolated, OmegaConf.merge(start, one_head), both
    forks.call(rank_main, "heads_apart", cfgs, tmp_path)
    assert_head_0_is_that_of(tmp_path / "isolated", tmp_path / "alone")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")
    one, _ = run(apart | {"batch_size": 2 * APART["batch_size"]})
    for got, want in zip(trained(tmp_path / "whole"), trained(one), strict=True):
        for key in want.keys() - {"padding_share"}:
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-7), key
    frozen = {k for k in weights_of(one) if "extra_heads" not in k}
    base = torch.load(Path(rho1["checkpointer"]["checkpoint_dir"]) / "consolidated.pth")
    after = weights_of(tmp_path / "whole")
    assert all(torch.equal(after[key], base[key]) for key in frozen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "accumulation"), [pytest.param(8, 1, marks=pytest.mark.nightly), (2, 4)]
)
def test_another_number_of_ranks_goes_on_with_the_same_data(
    forks, run, base_config, tmp_path, batch_size, accumulation
):
    """Saved at step 4 by two ranks x 4, gone on with by one, through the end of an epoch."""
    more = {"max_steps": 14, "save_every_n_steps": 4, "batch_size": 4, "keep_last": 9}
    forks.call(rank_main, "killed", OmegaConf.merge(base_config, more), tmp_path)
    alone = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    run(more | alone | {"resume_from_checkpoint": True}, tmp_path / "killed")
    whole = trained(tmp_path / "whole")
    other = trained(tmp_path / "killed")
    assert [line["step"] for line in other] == [line["step"] for line in whole]
    for got, want in zip(other, whole, strict=True):
        for key in ("loss", "val_loss", "weighted_loss", "tokens_per_forward"):
            if key in want:
                assert got[key] == pytest.approx(want[key], abs=1e-6), (key, want["step"])


def test_a_run_that_needs_more_memory_than_there_is(run, recipe, monkeypatch):
    """The allocator's own error, of a request that no machine can meet."""
    original = recipe.Rho1WMTPRecipeDistributed._loss_step

    def greedy(self, batch):
        if self._run.step == 1:
            torch.empty(2**55)
        return original(self, batch)

    monkeypatch.setattr(recipe.Rho1WMTPRecipeDistributed, "_loss_step", greedy)
    with pytest.raises(SystemExit) as end:
        run()
    sentence = str(end.value)
    assert sentence.startswith(
        "TrainingError: out of memory in a step of 4 rows x 64 tokens x 4 heads on each of 1 ranks"
    )
    assert "What needs less: activation_checkpointing=selective; activation_che" in sentence
    assert "`python -m wmtp_modules.estimate_memory --config" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "dft"])
def test_ranks_with_nothing_to_learn_from_or_a_nan(forks, base_config, tmp_path, name):
    """None hangs; what is no step is skipped on both, and their parameters stay equal."""
    more = {"weighting": {"name": name}, "max_skipped_steps": 4, "collective_timeout_s": 120}
    forks.call(rank_main, "odd_batches", OmegaConf.merge(base_config, more), tmp_path)
    folder = tmp_path / "odd"
    steps = map(json.loads, (folder / "skipped_steps.jsonl").read_text().splitlines())
    assert [(step["step"], step["reason"]) for step in steps] == [
        (3, "no token is supervised"),
        (4, "the gradient norm is nan"),
        (5, "the loss is nan"),
    ]
    lines = [line for line in metrics_of(folder) if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 3, 3]
    assert "loss" not in lines[2]  # it has no target
    assert lines[-1]["loss"] < lines[1]["loss"]
    assert all(value.isfinite().all() for value in weights_of(folder).values())


def test_noise_is_reported(rho1_run):
    _, summary = rho1_run
    assert 0 < summary["corrupted_share"]["data"] < 0.3
    assert 0 <= summary["corrupted_share"]["selected"] < 0.4


@pytest.fixture(scope="module")
def rho1_bf16(rho1):
    """In bf16 the reference scores in bf16 too: another table, as its fingerprint says."""
    table = {"table_dir": rho1["reference"]["table_dir"] + "_bf16"}
    return rho1 | {"dtype": "bf16", "reference": rho1["reference"] | table}


@pytest.mark.nightly
@needs_compiler  # torchao compiles the optimizer's step
def test_bf16_with_8_bit_adamw_and_stochastic_rounding(run, rho1_bf16):
    """As configs/rho1/7b_single_gpu.yaml; its quantised optimizer state survives a resume."""
    overrides = rho1_bf16 | {
        "fp32_master_weights": False,
        "optimizer": {
            "_component_": "torchao.optim.AdamW8bit",
            "lr": 0.003,
            "bf16_stochastic_round": True,
        },
    }
    folder, _ = run(overrides)
    losses = [line["val_loss"] for line in metrics_of(folder) if "val_loss" in line]
    assert losses[-1] < losses[0]
    assert weights_of(folder)["output.weight"].dtype == torch.bfloat16
    _, summary = run(overrides | {"max_steps": 8, "resume_from_checkpoint": True}, folder)
    assert summary["steps"] == 8
    assert [line["step"] for line in metrics_of(folder) if "loss" in line] == list(range(1, 9))
    assert summary["heldout_loss"]["rho1"][0] < losses[0]


@pytest.mark.slow
def test_bf16_compute_keeps_fp32_masters(run, rho1_bf16):
    """At a tiny learning rate bf16 parameters would not move at all.

    A table of an earlier version, of logits that were rounded to bf16, is not taken for this one's.
    """
    tiny = OmegaConf.merge(rho1_bf16, {"optimizer": {"lr": 1e-6}, "max_steps": 3})
    folder, _ = run(tiny)
    losses = [line["val_loss"] for line in metrics_of(folder) if "val_loss" in line]
    assert losses[-1] != losses[0]
    manifest = json.loads((Path(tiny.reference.table_dir) / "manifest.json").read_text())
    assert manifest["fingerprint"]["dtype"] == "bf16, fp32 logits"


@pytest.mark.nightly
@needs_compiler
def test_compile_equals_eager(run, uniform):
    folder, _ = run({"compile": True})
    for got, want in zip(metrics_of(folder), metrics_of(uniform[0]), strict=True):
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)


# ------------------------------------------------------------------- bad input


def check_error(recipe, base_config, overrides, match):
    with pytest.raises(ConfigError, match=match):
        recipe.check(OmegaConf.merge(base_config, overrides))


def test_values_out_of_range_come_all_at_once(recipe, base_config, monkeypatch):
    at_least_one = [
        *("batch_size", "gradient_accumulation_steps", "max_steps", "run_val_every_n_steps"),
        *("save_every_n_steps", "log_every_n_steps"),
    ]
    wrong = dict.fromkeys(at_least_one, 0) | {
        "seed": -1,
        "clip_grad_norm": 0.0,
        "num_warmup_steps": -1,
        "optimizer": {"lr": 0.0},
        "tokenizer": {"max_seq_len": 1},
    }
    with pytest.raises(ConfigError, match="11 errors") as error:
        recipe.check(OmegaConf.merge(base_config, wrong))
    for key in at_least_one:
        assert f"  {key}: must be at least 1, got 0" in str(error.value)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_error(recipe, base_config, {"compile": True}, r"needs a C\+\+ compiler")
    reference = {"mode": "online", "checkpointer": {"checkpoint_dir": "a"}, "table_dir": "b"}
    bad = {"reference": reference | {"batch_tokens": 0}}
    check_error(recipe, base_config, bad, "reference.batch_tokens: must be at least 1")
    same = {"dataset_val": base_config.dataset | {"split": "validation", "seed": 2}}
    both = {"dataset": {"validation_fraction": 0.1}, "dataset_val": {"validation_fraction": 0.1}}
    check_error(recipe, base_config, OmegaConf.merge(same, both), "dataset_val: divides the source")


def test_a_model_from_nothing_that_does_not_fit_its_tokenizer(run, tmp_path):
    with pytest.raises(SystemExit, match="has 512 pieces but tok_embeddings has 500 rows"):
        run({"model": {"vocab_size": 500}})
    with pytest.raises(SystemExit, match=r"max_seq_len 64 exceeds model.max_seq_len 32"):
        run({"model": {"max_seq_len": 32}})
    with pytest.raises(SystemExit, match=r"none.model is missing: that file does not exist"):
        run({"tokenizer": {"path": str(tmp_path / "none.model")}})
    with pytest.raises(SystemExit, match="n_future_tokens 9 must be at least 1 and below"):
        run({"model": {"n_future_tokens": 9}})


def test_references_that_do_not_fit(run, rho1, base_config, tmp_path):
    """Found before anything is scored."""
    args = {key: value for key, value in base_config.model.items() if key != "_component_"}
    for name, changes in {"heads": {"n_future_tokens": 2}, "short": {"max_seq_len": 32}}.items():
        model = mtp_llama2(**args | {"n_future_tokens": 1} | changes)
        init_weights_(model, 0)
        path = base_config.tokenizer.path
        save_meta(model, tmp_path / name, tokenizer_path=path, dtype=torch.float32)
    for name, message in {
        "heads": "the MTP reference in .*heads has 2 heads, the model 4: use one with",
        "short": "short was trained on rows of 32 tokens, this run has rows of 64",
    }.items():
        checkpointer = {"checkpoint_dir": str(tmp_path / name)}
        other = {"checkpointer": checkpointer, "table_dir": str(tmp_path / "scores")}
        with pytest.raises(SystemExit, match=message):
            run(OmegaConf.merge(rho1, {"reference": other}))
    assert not (tmp_path / "scores").exists()


def test_config_errors_come_before_anything_is_built(recipe, base_config, monkeypatch):
    check_error(recipe, base_config, {"optimizer": {"learning_rte": 3}}, "did you mean 'lr'")
    check_error(recipe, base_config, {"max_step": 3}, "did you mean 'max_steps'")
    check_error(recipe, base_config, {"weighting": {"name": "rho1"}}, "reference: missing")
    check_error(recipe, base_config, {"controls": ["shuffled"]}, "reference: missing")
    check_error(recipe, base_config, {"fp32_master_weights": False}, "bf16_stochastic_round")
    rounding = {
        "fp32_master_weights": False,
        "optimizer": {"_component_": "torchao.optim.AdamW8bit", "bf16_stochastic_round": True},
    }
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_error(recipe, base_config, rounding, "is for one rank")
    check_error(recipe, base_config, {"dtype": "fp16"}, "dtype: must be one of 'bf16', 'fp32'")


def test_data_smaller_than_a_joint_micro_batch(run):
    with pytest.raises(SystemExit, match=r"fewer than one joint micro-batch of 1 ranks x 999"):
        run({"batch_size": 999})


def test_reference_with_another_vocabulary(run, rho1, reference, tmp_path, tiny_tokenizer_path):
    from sentencepiece import sentencepiece_model_pb2

    shutil.copytree(reference[0] / "last", tmp_path / "other")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer_path.read_bytes())
    proto.pieces[300].piece, proto.pieces[301].piece = "swapped", "pieces"
    (tmp_path / "other" / "tokenizer.model").write_bytes(proto.SerializeToString())
    other = {"reference": {"checkpointer": {"checkpoint_dir": str(tmp_path / "other")}}}
    with pytest.raises(SystemExit, match="differ in 2 pieces"):
        run(OmegaConf.merge(rho1, other))


def test_wrong_checkpoint(run, rho1, reference):
    wrong = {"checkpointer": {"checkpoint_dir": str(reference[0] / "last")}}
    with pytest.raises(SystemExit, match="n_future_tokens"):
        run(rho1 | wrong)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"dataset": {"seed": 5, "validation_fraction": 0.5}}, "dataset"),
        ({"dtype": "bf16"}, "dtype"),
    ],
)
@pytest.mark.usefixtures("rho1_run")
def test_score_table_made_for_something_else(run, rho1, other, part):
    with pytest.raises(SystemExit, match=f"made for something else.*{part}: the table has"):
        run(OmegaConf.merge(rho1, other))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/rho1/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(recipe, path):
    recipe.check(OmegaConf.load(path))
