"""The critic's recipe run for real on one process: small models, all stages, every refusal."""

import importlib.util
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from wmtp_modules.config import rules
from wmtp_modules.config.check import ConfigError
from wmtp_modules.critic import rewards
from wmtp_modules.parallel.process_group import init_process_group
from wmtp_modules.run import model as run_model
from wmtp_modules.run import plan, start
from wmtp_modules.run.run import Run
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.scoring import score_table

pytestmark = pytest.mark.usefixtures("drawn")  # pictures are not

ROOT = Path(__file__).parents[2]
TABLES = ("rewards", "critic", "values")


@pytest.fixture(scope="module")
def recipe():
    """The recipe's module; tests are its only importer."""
    spec = importlib.util.spec_from_file_location(
        "critic_recipe", ROOT / "recipes" / "critic_wmtp_distributed.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_process():
    """Device and mesh of a process that torchrun did not start."""
    yield init_process_group("cpu")
    dist.destroy_process_group()


def write_rows(path: Path, problems: range, *, bad: bool = True) -> None:
    """Good responses name b and bad ones d, from somewhere inside a body on: the token that first
    tells them apart is known, and lengths are equal."""
    rng = random.Random(problems.start)
    with path.open("w") as file:
        for i in problems:
            body = [f"    x{rng.randrange(9)} = {rng.randrange(9)}\n" for _ in range(3)]
            place = rng.randrange(3)
            for reward, name in ((1.0, "b"), (0.0, "d")) if bad else ((1.0, "b"),):
                later = [f"    y = {name}{rng.randrange(9)}\n" for _ in body[place:]]
                lines = body[:place] + later
                at = sum(map(len, lines[:place])) + lines[place].index(name)
                row = {"prompt": f"def f{i}(a):\n", "response": "".join(lines), "reward": reward}
                marks = {} if reward else {"noise": [[at, at + 1]]}
                file.write(json.dumps(row | {"problem_id": f"p{i}"} | marks) + "\n")


@pytest.fixture(scope="module")
def base_config(tmp_path_factory, tiny_tokenizer_path):
    """All stages in a few seconds; tests override what they are about."""
    folder = tmp_path_factory.mktemp("critic_recipe")
    write_rows(folder / "train.jsonl", range(200))
    write_rows(folder / "heldout.jsonl", range(1000, 1030))
    write_rows(folder / "good_only.jsonl", range(200), bad=False)
    rows_of = {"_component_": "wmtp_modules.data.rows_dataset"}
    adamw = {"_component_": "torch.optim.AdamW", "lr": 0.003}
    return OmegaConf.create(
        {
            "output_dir": str(folder / "base"),
            "device": "cpu",
            "dtype": "fp32",
            "fp32_master_weights": True,
            "seed": 1,
            "stages": ["rewards", "critic", "values", "policy"],
            "resume_from_checkpoint": False,
            "model": {
                "_component_": "wmtp_modules.models.mtp_llama2",
                "vocab_size": 512,
                "num_layers": 6,
                "n_future_tokens": 4,
                "num_heads": 2,
                "num_kv_heads": 2,
                "embed_dim": 32,
                "max_seq_len": 128,
            },
            "checkpointer": None,
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": str(tiny_tokenizer_path),
                "max_seq_len": 128,
            },
            "dataset": rows_of | {"source": str(folder / "train.jsonl")},
            "dataset_val": rows_of | {"source": str(folder / "heldout.jsonl")},
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "weighting": {"name": "critic"},
            "optimizer": adamw,
            "num_warmup_steps": 2,
            "clip_grad_norm": 1.0,
            "max_steps": 4,
            "run_val_every_n_steps": 2,
            "save_every_n_steps": 2,
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
def go(recipe, one_process, base_config, tmp_path_factory):
    """go(overrides) -> (output folder, summary of all stages)."""
    stops = StopRequests()

    def run(overrides=None, output_dir=None):
        output_dir = output_dir or tmp_path_factory.mktemp("run")
        cfg = OmegaConf.merge(base_config, overrides or {}, {"output_dir": str(output_dir)})
        recipe.check(cfg)
        one = recipe.CriticWMTPRecipeDistributed(cfg, *one_process, stops)
        summary = recipe.make_stages(one, cfg.stages)
        if "policy" in cfg.stages:
            policy_cfg = OmegaConf.merge(cfg, {"stages": ["policy"]})
            summary |= recipe.train_one(one, policy_cfg, stops, {})
        return Path(output_dir), summary

    return run


@pytest.fixture(scope="module")
def base(go):
    """A model from nothing, by the same recipe, without any critic."""
    return go(
        {
            "stages": ["policy"],
            "weighting": {"name": "uniform"},
            "max_steps": 40,
            "run_val_every_n_steps": 40,
            "save_every_n_steps": 40,
        }
    )


def with_critic(base, folder: Path, **critic) -> dict:
    """Overrides for the stages on top of the base, their results below ``folder``."""
    return {
        "checkpointer": {"checkpoint_dir": str(base[0] / "last")},
        "rewards": {"source": "labels", "table_dir": str(folder / "rewards"), "batch_tokens": 4096},
        "critic": {
            "checkpoint_dir": str(folder / "critic"),
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
            "batch_size": 16,
            "max_steps": 100,
            "eval_every_n_steps": 20,
            "patience": 6,
            **critic,
        },
        "value_table": {"table_dir": str(folder / "values"), "batch_tokens": 4096},
        # One token tells good from bad, so a table of token counts knows as much as any critic.
        "allow_uninformative_critic": True,
    }


@pytest.fixture(scope="module")
def staged(base, go, drawn, tmp_path_factory):
    """Every stage, once: (overrides, output folder, summary).

    A table of token counts knows these responses, so no critic passes the gate here.
    """
    overrides = with_critic(base, tmp_path_factory.mktemp("stages"))
    overrides["allow_uninformative_critic"] = True
    with drawn():
        return overrides, *go(overrides)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return torch.load(folder / "last" / "consolidated.pth", weights_only=True)


def assert_same_weights(got, want, tolerance=0.0):
    for key, value in weights_of(want).items():
        torch.testing.assert_close(weights_of(got)[key], value, rtol=tolerance, atol=tolerance)


def folder_of(overrides) -> Path:
    return Path(overrides["critic"]["checkpoint_dir"])


# ------------------------------------------------------------------------------ stages


@pytest.mark.slow
@pytest.mark.parametrize("how", ["turn", "state", "pairs"])
def test_the_critic_knows_what_it_must(how, staged, base, go, tmp_path):
    """Of one token that names d, a table of counts knows all: the critic may do as well."""
    if how == "turn":
        summary, folder = staged[2], folder_of(staged[0])
    else:
        more = {"objective": "pairs"} if how == "pairs" else {"head": "state", "max_steps": 40}
        overrides = with_critic(base, tmp_path, **more)
        _, summary = go(overrides | {"stages": ["rewards", "critic"]})
        folder = folder_of(overrides)
    critic = summary["critic"]
    assert critic["cross_entropy"] < critic["constant"] == pytest.approx(math.log(2), abs=1e-6)
    if how != "state":  # which has forgotten at the end what it saw
        assert critic["pair_accuracy"] > max(critic["length_only"], 0.5) + 0.1
        assert critic["auc"] > 0.6
    assert (critic["pairs"], critic["pair_kind"], critic["rows"]) == (30, "problem", 60)
    assert critic["auc_spoiled"].keys() == {"critic", "token_table", "lm_loss", "position"}
    assert critic["turn"]["rows"] == 30
    assert critic["mean_value"]["good_share"] == 0.5
    assert critic["hopeless_problems"] == {"count": 0, "names": []}
    assert (critic["kappa"] != 1) == (how == "pairs")
    assert json.loads((folder / "critic.json").read_text())["fingerprint"]["head"] == {
        "pairs": "sum"
    }.get(how, how)


@pytest.mark.slow
def test_what_the_stages_leave(staged):
    overrides, output, summary = staged
    folder = folder_of(overrides)
    assert {"value_head.safetensors", "critic.json", "calibration.png", "weights.html"} <= {
        file.name for file in folder.iterdir()
    }
    assert (folder / "calibration.png").stat().st_size > 5000
    page = (folder / "weights.html").read_text()
    assert page.count("good response (f 1.00)") == page.count("bad response (f 0.00)") == 4
    assert "Advantage value, weights from 0.0 to 20.0" in page
    (scale,) = (folder.parent / "values").glob("scale-*.json")  # of page and policy
    assert len(json.loads(scale.read_text())["scale"]["scale_K"]) == 4
    record = json.loads((folder / "critic.json").read_text())
    assert record["rewards"] == {"mean": 0.5, "std": 0.5}
    assert record["report"]["base"] == 0  # half of the responses are good
    line = metrics_of(output)[-1]
    means = [line[f"weight_mean_head_{k}"] for k in range(4)]
    assert means == pytest.approx([1.0] * 4, abs=0.5)  # 1 over the data set, not over these rows
    assert line["ess"] < 1
    assert set(summary["heldout_loss"]) == {"base", "critic"}
    share = summary["weight_on_spoiled"]
    assert share["critic"] < share["data"]
    for name in ("best", "last"):
        files = {file.name for file in (output / name).iterdir()}
        assert files == {"consolidated.pth", "params.json", "tokenizer.model"}
    page = (output / "run.html").read_text()
    assert f"Complete after {summary['steps']} steps." in page
    assert "value after it 0." in page


@pytest.mark.slow
def test_done_stages_are_skipped(staged, go):
    overrides, _, summary = staged
    parent = folder_of(overrides).parent
    files = [file for name in TABLES for file in (parent / name).rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) > 8
    _, again = go(overrides)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again["heldout_loss"] == summary["heldout_loss"]


@pytest.mark.slow
def test_a_critic_trained_otherwise_is_not_taken_for_done(staged, go):
    """Another seed would make another critic; the policy alone may have any seed."""
    overrides, _, _ = staged
    with pytest.raises(SystemExit, match=r"something else \(seed: the critic has 1, this run 5"):
        go(overrides | {"stages": ["critic"], "seed": 5})
    go(overrides | {"stages": ["policy"], "seed": 5, "max_steps": 1})


@pytest.mark.slow
def test_all_responses_train_and_good_ones_validate_whatever_trains(
    staged, go, base_config, caplog, tmp_path
):
    """The base's held-out loss is that on good responses alone, which a run without rewards has."""
    lines = Path(base_config.dataset_val.source).read_text().splitlines()
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(line for line in lines if json.loads(line)["reward"]) + "\n")
    steps = {"stages": ["policy"], "max_steps": 2}
    uniform = steps | {"weighting": {"name": "uniform"}}
    with caplog.at_level("INFO"):
        runs = [
            go(staged[0] | more)[1]["heldout_loss"]["base"]
            for more in (steps, uniform, uniform | {"policy_rewards_above": 0.0})
        ]
    counts = re.findall(r"Policy: (\d+) of 400 responses", caplog.text)
    assert counts == ["400", "400", "200"]
    checkpointer = {"checkpointer": staged[0]["checkpointer"]}
    _, plain = go(uniform | checkpointer | {"dataset_val": {"source": str(good)}})
    assert runs == [plain["heldout_loss"]["base"]] * 3
    _, every = go(uniform | checkpointer)
    assert every["heldout_loss"]["base"] != runs[0]


@pytest.fixture
def constant_values(recipe, monkeypatch):
    """A critic that knows nothing: V is the same after every token."""

    def constant(model, head, rows):
        lengths = [len(row[0] if isinstance(row, tuple) else row) for row in rows]
        return [np.full(length, 0.3, np.float32) for length in lengths]

    monkeypatch.setattr(recipe.values, "row_values", constant)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weighting", [{}, {"advantage": "relative", "strength": 0.3}, {"advantage": "gated"}], ids=str
)
def test_a_critic_that_knows_nothing_does_no_harm(
    staged, go, constant_values, uniform_run, tmp_path, weighting
):
    """The run is the uniform one to the bit."""
    overrides = staged[0] | {"stages": ["values", "policy"], "weighting": weighting}
    overrides["value_table"] = {"table_dir": str(tmp_path), "batch_tokens": 4096}
    folder, _ = go(overrides)
    files = [f / "last" / "consolidated.pth" for f in (folder, uniform_run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    line, other = metrics_of(folder)[-1], metrics_of(uniform_run)[-1]
    for key in ("loss", "weighted_loss", "val_loss", "grad_norm", "ess"):
        assert line[key] == other[key]


@pytest.fixture(scope="module")
def uniform_run(staged, go):
    """The same rows and steps, unweighted."""
    return go(staged[0] | {"stages": ["policy"], "weighting": {"name": "uniform"}})[0]


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["ratio", "td"])  # the others are in tests/golden
def test_every_advantage_trains(staged, go, advantage):
    more = {"stages": ["policy"], "weighting": {"advantage": advantage}, "max_steps": 1}
    folder, _ = go(staged[0] | more | {"run_val_every_n_steps": 1, "save_every_n_steps": 1})
    line = metrics_of(folder)[-1]
    assert line["ess"] < 1
    if advantage == "td":
        means = [line[f"weight_mean_head_{k}"] for k in range(4)]
        assert means == pytest.approx([1.0] * 4, abs=1e-4)


@pytest.mark.slow
def test_the_oracle_weighs_no_marked_token_and_needs_no_critic(base, go, base_config):
    more = {"stages": ["policy"], "weighting": {"name": "oracle"}, "max_steps": 2}
    folder, summary = go(more | {"checkpointer": {"checkpoint_dir": str(base[0] / "last")}})
    for line in metrics_of(folder)[1:]:
        assert line["noise_in_data"] > 0
        assert line["noise_in_weight"] == 0
    assert "oracle" in summary["heldout_loss"]


def test_the_oracle_without_marks_is_refused_before_anything_trains(
    main, go, base_config, tmp_path
):
    good_only = str(Path(base_config.dataset.source).with_name("good_only.jsonl"))
    unmarked = {"stages": ["policy"], "dataset": {"source": good_only}}
    with pytest.raises(SystemExit, match="no row of this data set has a mark"):
        go(unmarked | {"weighting": {"name": "oracle"}}, tmp_path / "out")
    as_control = {"weighting": {"name": "uniform"}, "controls": ["oracle"]}
    with pytest.raises(SystemExit, match="no row of this data set has a mark"):
        main(unmarked | as_control | {"output_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
def test_strength_zero_is_uniform(staged, go, uniform_run):
    overrides, weighted, _ = staged
    overrides = overrides | {"stages": ["policy"]}
    zero, _ = go(OmegaConf.merge(overrides, {"weighting": {"strength": 0.0}}))
    assert_same_weights(zero, uniform_run)
    with pytest.raises(AssertionError):
        assert_same_weights(weighted, uniform_run, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random_topk", "dft"])  # shuffled is in tests/golden
def test_every_control_runs(staged, go, name):
    overrides, _, _ = staged
    folder, summary = go(
        overrides | {"stages": ["policy"], "weighting": {"name": name}, "max_steps": 1}
    )
    line = metrics_of(folder)[-1]
    means = [line[f"weight_mean_head_{k}"] for k in range(4)]
    assert means == pytest.approx([1.0] * 4, abs=1e-4)
    assert line["ess"] < 1
    assert name in summary["heldout_loss"]


@pytest.mark.slow
def test_a_killed_critic_goes_on_where_it_was(base, go, recipe, staged, tmp_path, monkeypatch):
    overrides = with_critic(base, tmp_path) | {"stages": ["rewards", "critic"]}
    original = recipe.CriticWMTPRecipeDistributed._critic_loss
    calls = []

    def die(self, *args):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(recipe.CriticWMTPRecipeDistributed, "_critic_loss", die)
    with pytest.raises(KeyboardInterrupt):
        go(overrides)
    assert not (folder_of(overrides) / "critic.json").exists()
    go(overrides)
    assert len(calls) == 25 + 80  # from the evaluation at step 20
    files = [folder_of(o) / "value_head.safetensors" for o in (overrides, staged[0])]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_resumed_policy_has_all_that_it_had(staged, go, recipe, check_resumed, tmp_path):
    """The scale of the weights too: found anew by other ranks it differs a little."""
    steps = {"max_steps": 6, "save_every_n_steps": 2, "run_val_every_n_steps": 2}
    overrides = staged[0] | {"stages": ["policy"]} | steps
    cls = recipe.CriticWMTPRecipeDistributed
    check_resumed(cls, lambda more, folder: go(overrides | more, folder), tmp_path / "run")


@pytest.mark.slow
def test_the_watchdog_hears_of_every_batch_of_a_stage(base, go, recipe, monkeypatch, tmp_path):
    """A stage longer than the time-out would be ended, and one without a watchdog hang for days."""
    heard = []

    class Listening(recipe.Watchdog):
        watches = False

        def __enter__(self):
            self.watches = True
            return super().__enter__()

        def __exit__(self, *error):
            self.watches = False
            super().__exit__(*error)

        def beat(self, what, step=None):
            heard.append(what) if self.watches else None
            super().beat(what, step)

    monkeypatch.setattr(recipe, "Watchdog", Listening)
    overrides = with_critic(base, tmp_path, max_steps=10)
    overrides |= {"stages": ["rewards", "critic", "values"], "allow_uninformative_critic": True}
    go(overrides)
    steps = dict.fromkeys(what for what in heard if "step" in what)
    assert list(steps) == [f"the critic's step {step}" for step in range(1, 11)]
    for what in ("rewards (train)", "rewards (heldout)", "rows that judge the critic", "values"):
        assert heard.count(what) >= 2, what


@pytest.mark.nightly
def test_a_disk_that_is_full_at_any_write_of_a_stage(base, go, small_disk, tmp_path):
    """Reward tables, the critic's state, head, record and pictures, values; the policy writes what
    the Rho-1 recipe does. With room, the same command goes on to the same critic and values."""
    stages = {"stages": ["rewards", "critic", "values"], "allow_uninformative_critic": True}
    overrides = with_critic(base, tmp_path / "whole", max_steps=10) | stages
    go(overrides)

    def made(folder):
        record = json.loads((folder / "critic" / "critic.json").read_text())
        files = [f for f in folder.rglob("*") if f.suffix in (".arrow", ".safetensors", ".html")]
        return record["report"], {f.relative_to(folder): f.read_bytes() for f in files}

    whole = made(tmp_path / "whole")
    ended, kib = set(), 4
    while True:
        disk = small_disk(kib)
        overrides = with_critic(base, disk / "run", max_steps=10) | stages
        try:
            go(overrides)
            break
        except SystemExit as end:
            sentence = str(end.code)
        assert "No space left on device" in sentence
        named = re.search(rf"{disk}/run/([\w/.-]+)", sentence)
        assert named, sentence
        ended.add(named[1])
        small_disk(4096)
        go(overrides)
        assert made(disk / "run") == whole
        shutil.rmtree(disk / "run")
        kib += 20
    assert len(ended) >= 5, ended


@pytest.fixture
def main(recipe, one_process, base_config, monkeypatch):
    """main(overrides): ``recipe_main`` of a config, in the group of this process."""
    monkeypatch.setattr(start, "init_process_group", lambda *_: one_process)
    monkeypatch.setattr(start.dist, "destroy_process_group", lambda: None)
    return lambda overrides: recipe.recipe_main.__wrapped__(OmegaConf.merge(base_config, overrides))


@pytest.mark.slow
def test_stages_alone_do_not_mark_a_policy_as_complete(staged, main, tmp_path):
    """A start without resume_from_checkpoint would then delete the states of an interrupted one."""
    overrides = staged[0] | {"stages": ["rewards", "critic"], "output_dir": str(tmp_path)}
    (tmp_path / "training_state" / "step_000002").mkdir(parents=True)
    main(overrides)
    assert not (tmp_path / "summary.json").exists()
    policy = {"stages": ["critic", "policy"], "controls": ["uniform"]}
    with pytest.raises(SystemExit, match="holds a run that was interrupted after step 2 or later"):
        main(overrides | policy)
    assert [path.name for path in tmp_path.iterdir()] == ["training_state"]
    plan.write_summary(tmp_path, {"steps": 3})
    main(overrides)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3
    assert "critic" in summary


def test_a_control_may_train_on_other_responses(base_config, main, tmp_path, caplog):
    """It stands under its name beside a run of the same weighting."""
    good = {"weighting.name": "uniform", "policy_rewards_above": 0}
    rewards = {"source": "labels", "table_dir": str(tmp_path / "rewards"), "batch_tokens": 4096}
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        main(
            {
                "output_dir": str(out),
                "stages": ["rewards", "policy"],
                "rewards": rewards,
                "policy_rewards_above": None,
                "weighting": {"name": "uniform"},
                "controls": {"uniform_good": good},
                "max_steps": 1,
            }
        )
    responses = [int(n) for n in re.findall(r"Policy: (\d+) of 400 responses", caplog.text)]
    assert responses == [200, 400]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["heldout_loss"]) == ["base", "uniform_good", "uniform"]
    assert summary["controls"] == {"uniform_good": good}


@pytest.mark.slow
def test_all_runs_of_a_config_read_and_hash_the_trunk_once(base, main, monkeypatch, tmp_path):
    """All stages and two controls. A 7B trunk and its reward model have 43 GB."""
    score_table._hash_once.cache_clear()
    hashed, loaded = [], []
    file_hash, load_into = score_table.file_hash, run_model.load_into

    def noting(model, *args, **kwargs):
        loaded.append(type(model).__name__)
        load_into(model, *args, **kwargs)

    monkeypatch.setattr(score_table, "file_hash", lambda p: hashed.append(p) or file_hash(p))
    monkeypatch.setattr(run_model, "load_into", noting)
    more = {"controls": ["uniform", "shuffled"], "output_dir": str(tmp_path / "out")}
    main(with_critic(base, tmp_path, max_steps=10) | more)
    assert hashed.count(base[0] / "last" / "consolidated.pth") == 1
    assert len(loaded) == 1 + 3  # the frozen trunk, and a model to train for each policy


@pytest.mark.slow
def test_a_policy_on_other_values_is_neither_done_nor_resumed(staged, go, base, tmp_path):
    """The same config, but the critic that it names was trained anew and differently."""
    first = with_critic(base, tmp_path, max_steps=10)
    go(first, tmp_path / "out")
    for name in ("critic", "values"):
        (tmp_path / name).rename(tmp_path / f"old_{name}")
    again = with_critic(base, tmp_path, max_steps=5) | {"stages": ["critic", "values"]}
    go(again)
    resumed = first | {"stages": ["policy"], "resume_from_checkpoint": True}
    with pytest.raises(SystemExit, match="was trained on other data, rewards or values"):
        go(resumed, tmp_path / "out")


@pytest.mark.slow
def test_a_resumed_policy_equals_an_uninterrupted_one(staged, go, monkeypatch, tmp_path):
    overrides = staged[0] | {"stages": ["policy"]}
    original = Run._log_step

    def die(self, *args):
        original(self, *args)
        if self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_log_step", die)
    with pytest.raises(KeyboardInterrupt):
        go(overrides, tmp_path)
    monkeypatch.undo()
    _, summary = go(overrides | {"resume_from_checkpoint": True}, tmp_path)
    assert_same_weights(tmp_path, staged[1])
    assert summary["heldout_loss"] == staged[2]["heldout_loss"]


def test_no_micro_step_of_a_policy_waits_for_the_device(recipe, staged, go, watched, tmp_path):
    found = watched(recipe.CriticWMTPRecipeDistributed)
    go(staged[0] | {"stages": ["policy"], "max_steps": 1}, tmp_path)
    assert found == []


@pytest.mark.slow
def test_a_policy_of_adapters_on_values_of_the_trunk(staged, go, tmp_path):
    """The same values and, before anything is learnt, the same loss and weights as without LoRA."""
    table = {"value_table": {"table_dir": str(tmp_path / "values"), "batch_tokens": 4096}}
    lora = {"lora": {"rank": 4, "targets": ["v_proj", "w1"]}}
    folder, summary = go(staged[0] | table | lora | {"stages": ["values", "policy"]})
    kept = folder_of(staged[0]).parent / "values"
    values = {file.name: file.read_bytes() for file in kept.glob("part-*.arrow")}
    assert values
    assert values == {f.name: f.read_bytes() for f in (tmp_path / "values").glob("part-*.arrow")}
    of_adapters, of_all = (
        next(line for line in metrics_of(one) if "loss" in line) for one in (folder, staged[1])
    )
    for name in ("loss", "ess", *(f"weight_mean_head_{k}" for k in range(4))):
        assert of_adapters[name] == pytest.approx(of_all[name], rel=1e-6), name
    start = Path(staged[0]["checkpointer"]["checkpoint_dir"], "consolidated.pth")
    before = torch.load(start, weights_only=True)
    changed = {
        key.split(".", 2)[-1] for key, v in weights_of(folder).items() if (v != before[key]).any()
    }
    assert changed == {"attention.wv.weight", "feed_forward.w1.weight"}
    assert (folder / "best" / "adapter_model.safetensors").exists()
    assert set(summary["heldout_loss"]) == {"base", "critic"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["only", "isolated"])
def test_a_policy_whose_further_heads_train_apart(staged, go, how):
    """With a critic's weights, folded in; before anything is learnt losses are those of full."""
    more = {"extra_heads": how, "distill": {"weight": 0.5}, "stages": ["policy"]}
    folder, summary = go(staged[0] | more)
    apart, full = (
        next(line for line in metrics_of(one) if "loss" in line) for one in (folder, staged[1])
    )
    for k in range(4):
        for name in (f"loss_head_{k}", f"weight_mean_head_{k}"):
            assert apart[name] == pytest.approx(full[name], rel=1e-6), name
        assert (f"distill_head_{k}" in apart) == (k > 0)
    assert ("grad_norm_extra_heads" in apart) == (how == "isolated")
    start = Path(staged[0]["checkpointer"]["checkpoint_dir"], "consolidated.pth")
    before = torch.load(start, weights_only=True)
    changed = {key for key, v in weights_of(folder).items() if (v != before[key]).any()}
    further = {key for key in before if key.startswith("extra_heads")}
    assert changed == further if how == "only" else changed > further
    heldout = summary["heldout_loss"]
    assert (heldout["base"][0] == heldout["critic"][0]) == (how == "only")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A small reward model in Hugging Face's format, as tests/critic makes it."""
    spec = importlib.util.spec_from_file_location(
        "reward_model_factory", ROOT / "tests" / "critic" / "reward_model_factory.py"
    )
    factory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(factory)
    return factory.make_reward_model(tmp_path_factory.mktemp("reward_model"))


@pytest.mark.slow
def test_rewards_of_a_reward_model(base, go, reward_model, monkeypatch, tmp_path):
    overrides = with_critic(base, tmp_path, max_steps=10)
    overrides["rewards"] |= {
        "source": "reward_model",
        "checkpointer": {"checkpoint_dir": str(reward_model)},
    }
    overrides |= {"stages": ["rewards", "critic"], "allow_uninformative_critic": True}
    _, summary = go(overrides)
    record = json.loads((tmp_path / "critic" / "critic.json").read_text())
    assert record["rewards"]["std"] > 0
    assert summary["critic"]["rows"] == 60
    monkeypatch.delattr(rewards, "RewardModel")  # found done: it is not even loaded
    go(overrides)


# -------------------------------------------------------------------------- refusals


def check_error(recipe, base_config, overrides, match):
    with pytest.raises(ConfigError, match=match):
        recipe.check(OmegaConf.merge(base_config, overrides))


def test_config_errors_come_before_anything_is_built(recipe, base_config, base, tmp_path):
    full = with_critic(base, tmp_path)
    for wrong, match in (
        (
            {"stages": ["policy", "critic"]},
            "some of rewards, critic, values, policy, in that order",
        ),
        ({"stages": ["polcy"]}, "some of rewards"),
        ({"stages": []}, "some of rewards"),
        ({"rewards": None}, "rewards: missing"),
        ({"critic": None}, "critic: missing"),
        ({"value_table": None}, "value_table: missing"),
        ({"checkpointer": None}, "a critic needs a trained trunk"),
        ({"rewards": {"source": "reward_model"}}, r"rewards\.checkpointer: missing"),
        ({"rewards": {"source": "human"}}, r"rewards\.source: must be one of"),
        (
            {"critic": {"objective": "pairs", "head": "turn"}},
            r"critic\.head: turn is for objective bce",
        ),
        ({"critic": {"objective": "gan"}}, r"critic\.objective: must be one of"),
        ({"stages": ["values"], "weighting": {"name": "uniform"}, "rewards": None}, "rewards: mis"),
        (
            {"stages": ["critic"], "weighting": {"name": "uniform"}, "checkpointer": None},
            "a critic needs a trained trunk",
        ),
        ({"weighting": {"lamda": 1.0}}, "did you mean 'lam'"),
        ({"weighting": {"advantage": "values"}}, "'values' is not one of value, relative, gated"),
        ({"controls": ["rho1"]}, r"^controls\.rho1\.weighting\.name 'rho1' is not one of critic"),
        (
            {"controls": {"a": {"policy_rewards_abov": 0}}},
            r"^controls\.a\.policy_rewards_abov: unknown key \(did you mean 'policy_rewards_above'",
        ),
        ({"controls": {"a": {"weighting": {"lam": 3}}}}, r"^controls\.a\.weighting\.lam must be"),
        ({"controls": {"a": {"critic.objective": "pairwise"}}}, "the stages before the policy are"),
        (
            {"controls": {"a": {"dataset.source": "x"}}},
            r"^controls\.a\.dataset\.source: no control",
        ),
        (  # only the control weighs by values
            {"weighting": {"name": "uniform"}, "controls": ["critic"], "value_table": None}
            | {"stages": ["policy"]},
            r"^controls\.critic\.value_table: missing",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            recipe.check(OmegaConf.merge(base_config, full, wrong))


def test_blocks_that_are_missing_and_a_wrong_weighting_come_at_once(
    recipe, base_config, base, tmp_path
):
    cfg = OmegaConf.merge(base_config, with_critic(base, tmp_path), {"seed": -1})
    for block in ("rewards", "critic", "value_table"):
        del cfg[block]
    del cfg.weighting.name
    with pytest.raises(ConfigError, match=r"2 errors\n  weighting.name: missing\n  seed: must be"):
        recipe.check(cfg)
    cfg.weighting = {"name": "critic"}
    with pytest.raises(ConfigError, match="4 errors") as caught:
        recipe.check(cfg)
    for block in ("rewards", "critic", "value_table"):
        assert f"  {block}: missing, the stages and the weighting need it" in str(caught.value)
    cfg.weighting.lam = 3
    with pytest.raises(ConfigError, match=r"2 errors\n  seed: .*\n  weighting.lam must be between"):
        recipe.check(cfg)


def test_a_uniform_run_needs_no_critic_and_no_threshold_without_rewards(recipe, base_config):
    plain = {"stages": ["policy"], "weighting": {"name": "uniform"}}
    recipe.check(OmegaConf.merge(base_config, plain))
    above = plain | {"policy_rewards_above": 0.5}
    check_error(recipe, base_config, above, "policy_rewards_above: there are no rewards")


def test_a_reward_model_needs_transformers(recipe, base_config, base, tmp_path, monkeypatch):
    model = {"source": "reward_model", "checkpointer": {"checkpoint_dir": "x"}}
    cfg = OmegaConf.merge(base_config, with_critic(base, tmp_path), {"rewards": model})
    recipe.check(cfg)
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs transformers: `uv sync --extra reward`"):
        recipe.check(cfg)


def test_heldout_rewards_that_do_not_differ(base, go, base_config, tmp_path):
    good_only = str(Path(base_config.dataset.source).with_name("good_only.jsonl"))
    overrides = with_critic(base, tmp_path) | {"dataset_val": {"source": good_only}}
    with pytest.raises(SystemExit, match=r"dataset_val: every response is 1 good"):
        go(overrides)
    assert not (tmp_path / "critic").exists()


def test_constant_rewards_train_nothing(base, go, base_config, tmp_path):
    good_only = str(Path(base_config.dataset.source).with_name("good_only.jsonl"))
    overrides = with_critic(base, tmp_path) | {"dataset": {"source": good_only}}
    with pytest.raises(SystemExit, match="needs good and bad responses"):
        go(overrides, tmp_path / "out")
    assert not (tmp_path / "critic").exists()
    assert not (tmp_path / "out").exists()


def test_no_bad_response_to_the_same_problem(base, go, base_config, tmp_path):
    """Rewards differ, but no problem has both kinds."""
    source = tmp_path / "apart.jsonl"
    lines = Path(base_config.dataset.source).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [row for i, row in enumerate(rows) if row["reward"] == (i // 2) % 2]
    source.write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(SystemExit, match="no two responses that the critic learns from"):
        go(with_critic(base, tmp_path, objective="pairs") | {"dataset": {"source": str(source)}})


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_missing_and_nan_rewards(base, go, base_config, tmp_path, bad):
    source = tmp_path / "unrewarded.jsonl"
    lines = Path(base_config.dataset.source).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[3]["reward"] = bad
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"reward.*row"):
        go(with_critic(base, tmp_path) | {"dataset": {"source": str(source)}})
    assert not (tmp_path / "critic").exists()


@pytest.mark.slow
def test_a_critic_from_another_trunk(staged, go, base, tmp_path):
    overrides, _, _ = staged
    other = {"checkpointer": {"checkpoint_dir": str(staged[1] / "last")}}
    for stages in (["values"], ["policy"], ["critic"]):
        with pytest.raises(SystemExit, match=r"made from something else \(trunk: the critic has"):
            go(OmegaConf.merge(overrides, other, {"stages": stages}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_value_cache_from_another_data_set(staged, go, base, base_config, tmp_path):
    """Fewer responses, scored and judged anew, with the old values."""
    source = tmp_path / "fewer.jsonl"
    lines = Path(base_config.dataset.source).read_text().splitlines()
    source.write_text("\n".join(lines[:300]) + "\n")
    overrides = with_critic(base, tmp_path, max_steps=10) | {"dataset": {"source": str(source)}}
    overrides["value_table"] = staged[0]["value_table"]
    with pytest.raises(SystemExit, match=r"made for something else \(.*dataset: the table has"):
        go(overrides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_critic_that_knows_nothing_stops_the_run(base, go, tmp_path):
    """At a learning rate of nothing its values stay equal."""
    ignorant = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-12}, "max_steps": 10}
    overrides = with_critic(base, tmp_path, **ignorant) | {"allow_uninformative_critic": False}
    with pytest.raises(SystemExit, match=r"knows nothing of use.*allow_uninformative_critic: true"):
        go(overrides, tmp_path / "out")
    with pytest.raises(SystemExit, match="knows nothing of use"):  # also when it is found done
        go(overrides | {"stages": ["policy"]}, tmp_path / "out")
    assert not (tmp_path / "values").exists()
    assert not (tmp_path / "out").exists()
    go(overrides | {"allow_uninformative_critic": True}, tmp_path / "out")


def test_stages_out_of_reach_say_what_to_add(base, go, tmp_path):
    overrides = with_critic(base, tmp_path)
    with pytest.raises(SystemExit, match="holds no complete score table"):
        go(overrides | {"stages": ["critic"]})
    go(overrides | {"stages": ["rewards"]})
    with pytest.raises(SystemExit, match="add 'critic' to stages"):
        go(overrides | {"stages": ["values"]})


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/critic/*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(recipe, path):
    recipe.check(OmegaConf.load(path))
