"""The evaluation's recipe on one process: a tiny random model, real programs, every stage."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torchtune.models.llama2 import llama2_tokenizer

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.check import ConfigError
from wmtp_modules.evaluation import execution
from wmtp_modules.evaluation.samples import generation_figures
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.process_group import init_process_group
from wmtp_modules.parallel.sharding import init_weights_
from wmtp_modules.sandbox.jobs import SandboxError
from wmtp_modules.sandbox.pool import Sandbox

pytestmark = pytest.mark.usefixtures("drawn")  # pictures are not

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((ROOT / "configs/eval").glob("*.yaml")), ROOT / "configs/quickstart/eval.yaml"]
TASKS = [
    {
        "task_id": f"Own/{n}",
        "prompt": f'def add_{n}(x):\n    """Add {n}."""\n',
        "entry_point": f"add_{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(3)
]


def import_recipe():
    """The recipe's module; tests are its only importer."""
    spec = importlib.util.spec_from_file_location("eval_recipe", ROOT / "recipes/eval_mtp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return import_recipe()


@pytest.fixture(scope="module")
def device(recipe):
    """Of a process that torchrun did not start."""
    yield init_process_group("cpu")[0]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tier():
    """A tier that this machine has."""
    try:
        with Sandbox(workers=1) as sandbox:
            return sandbox.tier
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer_path, device):
    """A folder with a checkpoint, tasks and texts, and a config that takes them."""
    folder = tmp_path_factory.mktemp("eval")
    model = mtp_llama2(
        vocab_size=512,
        num_layers=6,
        n_future_tokens=4,
        num_heads=2,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
    )
    init_weights_(model, seed=3)
    save_meta(model, folder / "model", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    write_rows(folder / "tasks.jsonl", TASKS)
    write_rows(
        folder / "texts.jsonl", [{"text": text} for text in ("x = 1\n", "def f():\n    y\n")]
    )
    # Keys that may be null are left out: one that is read without get ends every test.
    return OmegaConf.create(
        {
            "stages": ["generate"],
            "task": "humaneval",
            "source": str(folder / "tasks.jsonl"),
            "split": "all",
            "device": "cpu",
            "dtype": "fp32",
            "seed": 0,
            "checkpointer": {"checkpoint_dir": str(folder / "model")},
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": "${checkpointer.checkpoint_dir}/tokenizer.model",
            },
            "generation": {
                "samples_per_task": 2,
                "temperatures": [0.0, 1.0],
                "top_p": 1.0,
                "top_k": 0,
                "max_new_tokens": 8,
                "batch_size": 2,
                "decoding": "self_speculative",
            },
            "execution": {"tier": "auto"},
            "k": [1, 2, 5],
            "heldout": {"source": str(folder / "texts.jsonl"), "batch_tokens": 64},
            "decode_speed": {
                "source": str(folder / "texts.jsonl"),
                "prompts": 2,
                "prompt_tokens": 4,
                "max_new_tokens": 8,
                "batch_size": 1,
            },
        }
    )


@pytest.fixture
def run(recipe, device, base, tmp_path):
    """run(key=value, ...) -> (report, output folder); keys as on the command line."""

    def go(output_dir=tmp_path / "out", **overrides):
        dotted = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        cfg = OmegaConf.merge(base, OmegaConf.from_dotlist(dotted), {"output_dir": str(output_dir)})
        recipe.check(cfg)
        done = recipe.EvalMTPRecipe(cfg, device)
        done.setup()
        done.run()
        return json.loads((Path(output_dir) / "report.json").read_text()), Path(output_dir)

    return go


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_pass_the_check(recipe, path):
    cfg = OmegaConf.load(path)
    for key in [key for key in cfg if OmegaConf.is_missing(cfg, key)]:
        cfg[key] = "humaneval" if key == "task" else "rows.jsonl"  # what its user has to give
    recipe.check(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stages": ["generate", "exekute"]}, r"stages: 'exekute' is not one of generate, execute"),
        ({"stages": []}, "stages: 'none' is not one of"),
        ({"stages": ["execute"]}, "samples: missing, nothing to execute"),
        ({"samples": "reference"}, "samples: 'reference' already exist"),
        ({"checkpointer": None, "tokenizer": None}, "checkpointer: missing, stage generate"),
        (
            {"generation": {"temperatures": []}},
            "generation.temperatures: must be distinct and at least 0",
        ),
        ({"generation": {"temperatures": [0.5, 0.5]}}, "generation.temperatures"),
        ({"generation": {"temperatures": [-1.0]}}, "generation.temperatures"),
        ({"generation": {"top_p": 1.5}}, "generation.top_p: must be at most 1, got 1.5"),
        ({"k": [0]}, r"k: must be a list of numbers of at least 1, got \[0\]"),
        ({"generation": {"temperature": 1.0}}, "generation.temperature: unknown key"),
        ({"comparison": "official"}, "comparison: 'official' is for task=code_contests, not human"),
        ({"task": "code_contests", "comparison": "exact"}, "comparison: .*official.*strict"),
        ({"task": "humaneva"}, "task: must be one of 'mbpp'"),
    ],
)
def test_the_check_says_what_is_wrong(recipe, base, overrides, message):
    cfg = OmegaConf.merge(base, {"output_dir": "out"}, overrides)
    with pytest.raises(ConfigError, match=message):
        recipe.check(cfg)


# ---------------------------------------------------------------------------- generation


def test_samples_depend_on_no_batch(run, tmp_path):
    """Greedy ones are equal, others are not, and neither knows its batch or decoding."""
    keys = ("task_id", "sample", "temperature", "seed", "completion")

    def samples(folder, **overrides):
        run(tmp_path / folder, **overrides)
        return [
            [row[key] for key in keys] for row in read_rows(tmp_path / folder / "samples.jsonl")
        ]

    two, five = samples("two"), samples("five", generation__batch_size=5)
    assert sorted(two) == sorted(five)
    assert sorted(two) == sorted(samples("plain", generation__decoding="plain"))
    assert len(two) == 3 * 2 * 2
    greedy = {(row[0], row[4]) for row in two if row[2] == 0.0}
    drawn = {(row[0], row[4]) for row in two if row[2] == 1.0}
    assert (len(greedy), len(drawn)) == (3, 6)
    assert sorted(two) != sorted(samples("seed", seed=1))


def test_nothing_is_generated_twice(run, recipe, monkeypatch, caplog):
    """A killed run leaves half a line; the next one makes what is missing, and the same."""
    asked = []
    generate = recipe.generate_as_completed
    monkeypatch.setattr(
        recipe,
        "generate_as_completed",
        lambda m, t, r, **k: asked.extend(r) or generate(m, t, r, **k),
    )
    report, out = run()
    whole = (out / "samples.jsonl").read_bytes()
    assert len(asked) == 12
    lines = whole.splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    asked.clear()
    again, _ = run()
    assert len(asked) == 7
    assert "samples.jsonl: 20 bytes of an unfinished last line were cut off" in caplog.text
    assert sorted((out / "samples.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    assert again["generation"] == report["generation"]
    asked.clear()
    run()
    assert asked == []
    # Another temperature is another sample; those that are there stay.
    run(generation__temperatures=[1.0, 0.5])
    assert len(asked) == 6


def test_a_prompt_without_room_is_a_failing_sample(run):
    report, out = run(generation__max_new_tokens=50)
    rows = read_rows(out / "samples.jsonl")
    assert {row["completion"] for row in rows} == {""}
    assert report["generation"]["finish_reasons"] == {"prompt_too_long": 12}
    assert report["generation"]["tokens_per_forward"] is None


def test_no_room_for_any_prompt_is_an_error(run):
    with pytest.raises(ValueError, match="max_new_tokens 64 leaves no room for a prompt"):
        run(generation__max_new_tokens=64)


def test_one_head_drafts_nothing(run, tmp_path, tiny_tokenizer_path):
    args = dict(num_layers=2, n_future_tokens=1, num_heads=2, num_kv_heads=2, embed_dim=32)
    model = mtp_llama2(vocab_size=512, max_seq_len=64, **args)
    init_weights_(model, seed=3)
    one = tmp_path / "one"
    save_meta(model, one, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="has only one head, so there are no drafts"):
        run(checkpointer__checkpoint_dir=one)
    report, _ = run(checkpointer__checkpoint_dir=one, generation__decoding="plain")
    assert report["generation"]["acceptance_per_head"] == []


def test_generation_figures_are_sums_over_samples():
    rows = [
        {"finish_reason": "eos", "tokens": 7, "forwards": 2, "accepted": [2, 1, 1]},
        {"finish_reason": "length", "tokens": 5, "forwards": 4, "accepted": [0, 0, 0]},
        {"finish_reason": "prompt_too_long"},
    ]
    figures = generation_figures(rows)
    assert figures["tokens_per_forward"] == pytest.approx((7 + 5 - 2) / 6)
    assert figures["acceptance_per_head"] == pytest.approx([2 / 6, 1 / 6, 1 / 6])
    assert (figures["samples"], figures["tokens"]) == (3, 12)


@pytest.mark.slow
def test_two_ranks_make_the_samples_of_one(run, base, forks, tmp_path):
    _, out = run()
    cfg = OmegaConf.merge(
        base, {"output_dir": str(tmp_path / "two"), "stages": ["generate", "heldout"]}
    )
    forks.call(on_a_rank, cfg)
    two = read_rows(tmp_path / "two" / "samples.jsonl")
    assert sorted(map(json.dumps, two)) == sorted(map(json.dumps, read_rows(out / "samples.jsonl")))
    one, _ = run(tmp_path / "one", stages="[heldout]")
    shared = json.loads((tmp_path / "two" / "report.json").read_text())
    assert shared["tokens"] == one["tokens"]
    for ours, theirs in zip(shared["per_head"], one["per_head"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def on_a_rank(rank, cfg):
    torch.set_num_threads(1)
    recipe = import_recipe()
    device, _ = init_process_group("cpu")
    done = recipe.EvalMTPRecipe(cfg, device)
    done.setup()
    done.run()
    dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------- execution


def test_ready_made_samples(run, tier, tmp_path, drawn):
    """Right and wrong ones by verdict; the report has what scripts rely on."""
    samples = [
        {"task_id": "Own/0", "completion": "    return x\n"},
        {"task_id": "Own/0", "completion": "    return x + 1\n"},
        {"task_id": "Own/2", "completion": "    return x + 2\n"},
        {"task_id": "Own/2", "completion": "    raise KeyError\n"},
    ]
    path = write_rows(tmp_path / "samples.jsonl", samples)
    with drawn():
        report, out = run(stages="[execute]", samples=path)
    rows = {(row["task_id"], row["sample"]): row for row in read_rows(out / "results.jsonl")}
    verdicts = [rows[key]["verdict"] for key in [("Own/0", 0), ("Own/0", 1), ("Own/2", 0)]]
    assert verdicts == ["pass", "wrong", "pass"]
    assert rows["Own/2", 1]["verdict"] == "crash"
    assert "KeyError" in rows["Own/2", 1]["detail"]
    for row in rows.values():
        assert {"task_id", "sample", "verdict", "seconds", "peak_mb", "detail"} <= row.keys()
    assert (report["task"], report["tier"]) == ("humaneval", tier)
    assert (report["problems"], report["samples"], report["omitted_k"]) == (2, 4, [5])
    assert report["verdicts"] == {"pass": 2, "wrong": 1, "crash": 1}
    assert report["pass_at_k"]["1"]["value"] == pytest.approx(0.5)
    assert report["pass_at_k"]["2"]["value"] == pytest.approx(1.0)
    assert report["reference_failures"] == []
    assert report["tasks_without_samples"] == 1
    for name in ("report.md", "report.png", "config.yaml"):
        assert (out / name).stat().st_size > 0


@pytest.mark.parametrize("comparison", [None, "strict"])
def test_outputs_are_compared_as_the_config_says(run, tier, tmp_path, comparison):
    program = (
        "for _ in range(int(input())):\n    s = input()\n    print('Yes' if s == s[::-1] else 'No')"
    )
    samples = [{"task_id": "3_c_many_queries", "completion": program}]
    own = {"comparison": comparison} if comparison else {}
    report, out = run(
        stages="[execute]",
        task="code_contests",
        source=ROOT / "tests/samples/code_contests.jsonl",
        samples=write_rows(tmp_path / "samples.jsonl", samples),
        **own,
    )
    (row,) = read_rows(out / "results.jsonl")
    verdicts = (row["verdict"], row["other"])
    assert verdicts == (("wrong", "pass") if comparison else ("pass", "wrong"))
    assert report["comparison"] == (comparison or "official")
    assert report["other_comparison"]["changed"] == 1
    assert report["reference_failures"] == []


def test_nothing_is_executed_twice(run, tier, monkeypatch):
    _, out = run(stages="[execute]", samples="reference")
    results = (out / "results.jsonl").read_bytes()
    assert len(results.splitlines()) == 3
    started = []
    monkeypatch.setattr(execution, "asdict", lambda o: started.append(1) or asdict(o))
    run(stages="[execute]", samples="reference")
    assert started == []
    lines = results.splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    run(stages="[execute]", samples="reference")
    assert len(started) == 1
    assert len(read_rows(out / "results.jsonl")) == 3
    # What met a fault of the machine is tried again, and the new row counts.
    rows = read_rows(out / "results.jsonl")
    write_rows(out / "results.jsonl", [rows[0] | {"verdict": "infrastructure"}, *rows[1:]])
    started.clear()
    report, _ = run(stages="[execute]", samples="reference")
    assert len(started) == 1
    assert report["verdicts"] == {"pass": 3}


def test_a_task_whose_reference_fails_is_not_scored(run, base, tier, tmp_path):
    broken = TASKS[0] | {"canonical_solution": "    return None\n"}
    source = write_rows(tmp_path / "tasks.jsonl", [broken, *TASKS[1:]])
    rows = [{"task_id": f"Own/{n}", "completion": f"    return x + {n}\n"} for n in range(2)]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    report, _ = run(stages="[execute]", source=source, samples=samples, k="[1]")
    assert [row["task_id"] for row in report["reference_failures"]] == ["Own/0"]
    assert report["problems"] == 1


def test_generated_samples_are_executed(run, tier):
    report, out = run(stages="[execute,generate]")
    assert report["samples"] == 12
    assert report["generation"]["samples"] == 12
    assert [at["temperature"] for at in report["by_temperature"]] == [0.0, 1.0]
    assert len(read_rows(out / "results.jsonl")) == 12
    assert len(read_rows(out / "references.jsonl")) == 3
    # The file of one run's samples is another's input, each temperature by itself, in any order.
    rows = read_rows(out / "samples.jsonl")
    write_rows(out / "samples.jsonl", [*rows[1::2], *rows[::2], rows[0]])
    again, _ = run(out.parent / "again", stages="[execute]", samples=out / "samples.jsonl")
    figures = {at["temperature"]: at for at in again["by_temperature"]}
    assert figures == {at["temperature"]: at for at in report["by_temperature"]}
    completions = {(row["task_id"], row["temperature"], row["sample"]): row for row in rows}
    for row in read_rows(out.parent / "again" / "results.jsonl"):
        assert (row["task_id"], row["temperature"], row["sample"]) in completions
    # Another run's samples in the same file would be counted as this one's.
    run(out, generation__top_p=0.5)
    with pytest.raises(ValueError, match="samples of several checkpoints or settings"):
        run(out.parent / "mixed", stages="[execute]", samples=out / "samples.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"task_id": "Own/7", "completion": ""}], r"samples.jsonl:1: no task 'Own/7'"),
        ([{"completion": ""}], r"samples.jsonl:1: task_id is missing"),
    ],
)
def test_bad_samples_are_one_sentence(run, tier, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        run(stages="[execute]", samples=write_rows(tmp_path / "samples.jsonl", rows))


def test_an_earlier_report_outlives_a_typo_and_no_failing_run(run, recipe, tmp_path, monkeypatch):
    _, out = run(stages="[heldout]")
    for mistyped in ("heldout__source", "decode_speed__source"):
        with pytest.raises(ValueError, match=r"none.jsonl does not exist"):
            run(stages="[heldout,decode_speed]", **{mistyped: tmp_path / "none.jsonl"})
        assert (out / "report.json").exists()

    def fail(*_, **__):
        raise ValueError("at once")

    monkeypatch.setattr(recipe, "heldout_sums", fail)
    with pytest.raises(ValueError, match="at once"):
        run(stages="[heldout]")
    assert not (out / "report.json").exists()


def test_what_a_stage_found_is_there_if_the_next_one_fails(run, recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("at once")

    monkeypatch.setattr(recipe, "measure_decoding", fail)
    with pytest.raises(ValueError, match="at once"):
        run(stages="[heldout,decode_speed]")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["per_head"]


# -------------------------------------------------------------------------- heads, speed


def test_heldout_counts_are_those_of_the_documents(run, base):
    report, _ = run(stages="[heldout]")
    tokenizer = llama2_tokenizer(base.tokenizer.path)
    lengths = [len(tokenizer.encode(row["text"])) for row in read_rows(Path(base.heldout.source))]
    assert report["tokens"] == sum(lengths)
    assert [row["head"] for row in report["per_head"]] == [0, 1, 2, 3]
    for head, row in enumerate(report["per_head"]):
        assert row["tokens"] == sum(max(0, n - 1 - head) for n in lengths)
        assert {"loss", "top1", "top5"} <= row.keys()


def test_decoding_speed_and_its_control(run):
    report, _ = run(stages="[decode_speed]")
    assert report["identical"] is True
    assert report["tokens_per_forward"] >= 1
    assert report["plain_tokens_per_s"] > 0
    assert report["self_speculative_tokens_per_s"] > 0
    assert len(report["acceptance_per_head"]) == 3


def test_decoding_speed_of_a_model_with_a_short_context(run):
    """What configs/eval/decode_speed.yaml asks for is more than these 64 positions."""
    report, _ = run(stages="[decode_speed]", decode_speed__max_new_tokens=128)
    assert report["identical"] is True


@pytest.mark.slow
def test_metrics_have_names_that_mlflow_takes(recipe, run, base, tier, tmp_path):
    """A real MLflow store gets the figures and the files."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = {
        "_component_": "wmtp_modules.run.metric_logging.MLflowLogger",
        "tracking_uri": uri,
        "experiment_name": "eval",
    }
    OmegaConf.update(base, "metric_logger", logger)
    try:
        report, _ = run(stages="[execute,heldout]", samples="reference", k="[1]")
    finally:
        del base["metric_logger"]
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("eval").experiment_id])
    assert found.data.metrics["pass_at_1"] == 1.0
    assert found.data.metrics["heldout/loss_head_3"] == report["per_head"][3]["loss"]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"report.json", "report.md", "report.png", "results.jsonl"} <= names
