import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
from omegaconf import OmegaConf

from wmtp_modules.parallel.process_group import die_with_parent
from wmtp_modules.quickstarts import functions as quickstart_eval
from wmtp_modules.quickstarts.functions import PROBES, deal_members, prepare_functions

CONFIG = Path(__file__).parents[1] / "configs/quickstart/eval_base.yaml"
ARGUMENTS = {"vocab_size": 384, "seed": 0, "model_config": str(CONFIG)}


@pytest.fixture(scope="module")
def trainings():
    return []


@pytest.fixture(scope="module", autouse=True)
def no_training(trainings):
    """The recipe's place is taken by a few lines that leave what it leaves."""

    def run(command, env, check, preexec_fn):
        assert preexec_fn is die_with_parent  # a kill -9 of this process ends the training too
        trainings.append((command, env))
        cfg = OmegaConf.load(command[command.index("--config") + 1])
        cfg.assets_dir = command[-1].removeprefix("assets_dir=")
        folder = Path(cfg.output_dir)
        (folder / "last").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        (folder / "summary.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "assets"
    prepare_functions(str(folder), **ARGUMENTS)
    return folder


@pytest.fixture
def assets(made, tmp_path, trainings):
    folder = tmp_path / "assets"
    shutil.copytree(made, folder)
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), {"assets_dir": str(folder)})
    OmegaConf.save(cfg, folder / "model/config.yaml", resolve=True)
    trainings.clear()
    return folder


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def function_of(text):
    scope = {}
    exec(text, scope)
    (name,) = (name for name in scope if name != "__builtins__")
    return scope[name]


def passes(task, function):
    scope = {}
    exec(task["test"], scope)
    try:
        scope["check"](function)
    except AssertionError:
        return False
    return True


# ------------------------------------------------------------------------------ the data


def test_rows_are_what_their_readers_expect(made):
    tasks = rows_of(made, "tasks")
    assert len(tasks) == 50
    assert len({task["task_id"] for task in tasks}) == 50
    for task in tasks:
        assert list(task) == ["task_id", "prompt", "entry_point", "canonical_solution", "test"]
        assert task["prompt"].startswith(f"def {task['entry_point']}(x):\n")
        assert task["prompt"].endswith('"""\n')
        assert task["test"].count("assert candidate(") == len(PROBES)
    for part, n in (("base", 5_000), ("heldout", 200)):
        rows = rows_of(made, part)
        assert len(rows) >= n
        assert {tuple(row) for row in rows} == {("text",)}


def test_solutions_pass_their_tests_and_neighbours_fail(made):
    """Another constant, another operation, and the steps the other way round."""
    for task in rows_of(made, "tasks"):
        own = function_of(task["prompt"] + task["canonical_solution"])
        assert passes(task, own)
        assert not passes(task, lambda x, own=own: own(x) + 1)
        assert not passes(task, lambda x, own=own: own(x) + (x == PROBES[-1]))
        assert not passes(task, lambda x: x)


def test_no_training_function_solves_a_task(made):
    """Whatever a model copies from training or from held-out text, pass@k of it is 0."""
    tasks = rows_of(made, "tasks")
    solved_by = {}
    for task in tasks:
        own = function_of(task["prompt"] + task["canonical_solution"])
        solved_by[tuple(map(own, PROBES))] = task["task_id"]
    assert len(solved_by) == len(tasks)  # nor does one task's solution solve another
    texts = {part: [row["text"] for row in rows_of(made, part)] for part in ("base", "heldout")}
    behaviours = {
        part: {tuple(map(function_of(text), PROBES)) for text in part_texts}
        for part, part_texts in texts.items()
    }
    assert not behaviours["base"] & solved_by.keys()
    assert not behaviours["heldout"] & solved_by.keys()
    assert not behaviours["base"] & behaviours["heldout"]
    assert len(set(texts["base"])) == len(texts["base"])


def test_a_function_does_what_it_says(made):
    rows = [row["text"] for part in ("base", "heldout") for row in rows_of(made, part)]
    expected = {
        "take_modulo_7_then_double": ("Take x modulo 7, then double it.", [0, 2, 12, 10]),
        "negate_then_divide_by_3": (
            "Negate x, then divide it by 3, rounding down.",
            [0, -1, 0, -2],
        ),
        "square_then_subtract_12": ("Square x, then subtract 12 from it.", [-12, -11, -11, 13]),
        "multiply_by_5_then_add_4": ("Multiply x by 5, then add 4 to it.", [4, 9, -1, 29]),
    }
    by_name = {member.name: member for member in quickstart_eval.family()}
    for name, (doc, results) in expected.items():
        member = by_name[name]
        assert f'def {name}(x):\n    """{doc}"""\n' == member.prompt
        assert list(map(function_of(member.prompt + member.solution), (0, 1, -1, 5))) == results
    assert {row.split("(")[0].removeprefix("def ") for row in rows} <= by_name.keys()


def test_members_that_ignore_x_are_none_of_the_family():
    members = quickstart_eval.family()
    assert all(len(set(member.results)) > 1 for member in members)
    assert "take_modulo_2_then_divide_by_3" not in {member.name for member in members}


def test_texts_stay_exact_and_fit_the_model(made):
    """A row that is too long would be split, and a task's prompt could not be completed."""
    cfg = OmegaConf.load(CONFIG)
    tokenizer = spm.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    assert tokenizer.vocab_size() == cfg.model.vocab_size == ARGUMENTS["vocab_size"]
    texts = [row["text"] for part in ("base", "heldout") for row in rows_of(made, part)]
    texts += [task["prompt"] + task["canonical_solution"] for task in rows_of(made, "tasks")]
    lengths = []
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        lengths.append(len(ids) + 2)
    assert 2 * max(lengths) <= cfg.tokenizer.max_seq_len


def test_the_deal_is_of_the_seed():
    first, again, other = (deal_members(seed) for seed in (0, 0, 1))
    assert first == again
    assert not set(other["tasks"]) <= set(first["tasks"])
    assert [len(part) for part in other.values()][1:] == [200, 50]


# ----------------------------------------------------------------------------- the model


def test_the_model_is_trained_once(assets, trainings, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of another launcher")
    before = {path: path.stat().st_mtime_ns for path in assets.rglob("*") if path.is_file()}
    prepare_functions(str(assets), **ARGUMENTS)
    assert not trainings
    assert before == {path: path.stat().st_mtime_ns for path in assets.rglob("*") if path.is_file()}

    shutil.rmtree(assets / "model/last")
    prepare_functions(str(assets), **ARGUMENTS)
    ((command, environment),) = trainings
    assert command[0] == sys.executable
    assert command[3:] == [
        *("run", "--nproc_per_node", "2", "rho1_wmtp_distributed"),
        *("--config", str(CONFIG), "resume_from_checkpoint=true", f"assets_dir={assets}"),
    ]
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert "PATH" in environment


def test_another_config_or_a_killed_training_trains_again(assets, trainings, tmp_path):
    changed = OmegaConf.merge(OmegaConf.load(CONFIG), {"max_steps": 7})
    OmegaConf.save(changed, tmp_path / "changed.yaml")
    arguments = ARGUMENTS | {"model_config": str(tmp_path / "changed.yaml")}
    prepare_functions(str(assets), **arguments)
    assert len(trainings) == 1
    prepare_functions(str(assets), **arguments)
    assert len(trainings) == 1
    (assets / "model/summary.json").unlink()  # written at the end
    prepare_functions(str(assets), **arguments)
    assert len(trainings) == 2


def test_other_data_drop_the_model(assets, trainings):
    before = rows_of(assets, "tasks")
    (assets / "model/of_old_data").touch()
    prepare_functions(str(assets), **ARGUMENTS | {"seed": 1})
    assert rows_of(assets, "tasks") != before
    assert not (assets / "model/of_old_data").exists()
    assert len(trainings) == 1


def test_a_failed_training_is_one_sentence(assets, monkeypatch):
    shutil.rmtree(assets / "model")
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    message = r"model failed with exit code 3; its output is above\. To run it alone: .*tune run -"
    with pytest.raises(ValueError, match=message):
        prepare_functions(str(assets), **ARGUMENTS)


def test_a_missing_config_is_named(assets, monkeypatch):
    with pytest.raises(ValueError, match=r"gone\.yaml cannot be read"):
        prepare_functions(str(assets), **ARGUMENTS | {"model_config": "gone.yaml"})


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"version": 1, "vocab_size": 384, "seed": 0}',
        '{"quickstart": "critic", "version": 1, "vocab_size": 384, "seed": 0}',
    ],
)
def test_folders_of_others_are_refused_and_stay(tmp_path, content, trainings):
    trainings.clear()
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="holds files that the quickstart did not make: use"):
        prepare_functions(str(tmp_path), **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == content
    assert not trainings
