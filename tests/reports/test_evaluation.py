import json

import numpy as np
import pytest
from matplotlib.image import imread

from wmtp_modules.evaluation.code_contests import code_contests_task
from wmtp_modules.evaluation.humaneval import HumanEvalTask
from wmtp_modules.reports.evaluation import build_report, print_report, write_report
from wmtp_modules.reports.evaluation_figure import VERDICT_COLOURS

SANDBOX = {"tier": "bubblewrap", "self_test": {"network": True}, "machine_factor": 1.25}


def task(number, reference="    return 1\n"):
    return HumanEvalTask(f"HumanEval/{number}", reference, f"def f{number}():\n", "test", "f")


def row(number, sample, verdict, temperature=None):
    return {
        "task_id": f"HumanEval/{number}",
        "sample": sample,
        "temperature": temperature,
        "verdict": verdict,
        "seconds": 0.1,
        "peak_mb": 10.0,
        "detail": "",
    }


def results(number, verdicts, temperature=None):
    return [row(number, i, verdict, temperature) for i, verdict in enumerate(verdicts)]


def build(rows, *, references=(), tasks=None, task_name="humaneval", ks=(1, 2, 5), **more):
    tasks = [task(number) for number in range(4)] if tasks is None else tasks
    return build_report(
        task=task_name,
        tasks=tasks,
        results=rows,
        references=references,
        ks=ks,
        seed=0,
        **SANDBOX,
        **more,
    )


def test_figures_of_ready_made_samples():
    report = build(results(0, ["pass", "wrong"]) + results(1, ["crash", "timeout"]))
    assert report["problems"] == 2
    assert report["samples"] == 4
    assert report["verdicts"] == {"pass": 1, "wrong": 1, "crash": 1, "timeout": 1}
    assert report["pass_at_k"]["1"]["value"] == 0.25
    assert report["pass_at_k"]["2"]["value"] == 0.5
    assert report["omitted_k"] == [5]
    assert report["tasks_without_samples"] == 2
    assert (report["temperature"], report["oracle_temperature"]) == (None, {})
    assert {key: report[key] for key in SANDBOX} == SANDBOX
    assert report["reference_failures"] == []


def test_a_task_whose_reference_fails_is_reported_and_not_scored():
    references = [
        {**row(0, 0, "pass"), "key": "a"},
        {**row(1, 0, "timeout"), "key": "b", "detail": "too slow here"},
    ]
    report = build(results(0, ["wrong"]) + results(1, ["pass"]), references=references, ks=(1,))
    assert report["reference_failures"] == [
        {"task_id": "HumanEval/1", "verdict": "timeout", "detail": "too slow here"}
    ]
    assert report["problems"] == 1
    assert report["pass_at_k"]["1"]["value"] == 0.0
    assert report["verdicts"] == {"wrong": 1, "pass": 1}  # it was run all the same


def test_infrastructure_is_in_no_n():
    rows = results(0, ["pass", "infrastructure"]) + results(1, ["wrong", "pass"])
    report = build(rows + results(2, ["infrastructure"]))
    assert report["infrastructure"] == 2
    assert report["verdicts"]["infrastructure"] == 2
    assert report["pass_at_k"]["1"]["value"] == (1.0 + 0.5) / 2
    assert report["omitted_k"] == [2, 5]  # problem 0 has one sample left
    assert report["problems"] == 2
    assert report["tasks_without_samples"] == 2


def test_temperatures_and_the_oracle_are_kept_apart():
    rows = results(0, ["wrong", "wrong"], 0.8) + results(1, ["pass", "wrong"], 0.8)
    rows += results(0, ["pass", "wrong"], 0.1) + results(1, ["pass", "pass"], 0.1)
    report = build(rows, ks=(1, 2))
    first, second = report["by_temperature"]
    assert (first["temperature"], second["temperature"]) == (0.8, 0.1)
    assert (report["temperature"], report["pass_at_k"]) == (0.8, first["pass_at_k"])
    assert first["pass_at_k"]["1"]["value"] == 0.25
    assert second["pass_at_k"]["1"]["value"] == 0.75
    assert report["oracle_temperature"]["1"] == {"temperature": 0.1, **second["pass_at_k"]["1"]}
    assert report["samples"] == 8
    assert report["verdicts"] == {"pass": 4, "wrong": 4}
    assert (first["samples"], first["verdicts"]) == (4, {"wrong": 3, "pass": 1})


def test_problems_without_a_python3_reference_are_scored_and_counted():
    contest = code_contests_task(
        {
            "name": "a",
            "description": "Add.",
            "public_tests": {"input": ["1"], "output": ["1"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": [], "output": []},
            "solutions": {"language": [2, 2, 4], "solution": ["x", "y", "z"]},
        }
    )
    result = {**row(0, 0, "pass"), "task_id": "a"}
    report = build([result], tasks=[contest], task_name="code_contests", ks=(1,))
    assert report["not_supported"] == {"problems": 1, "languages": {"CPP": 1, "JAVA": 1}}
    assert report["pass_at_k"]["1"]["value"] == 1.0
    assert report["published"] == []


def test_what_the_other_comparison_would_change(tmp_path, capsys):
    pairs = ["pass pass", "pass wrong", "pass wrong", "wrong pass", "wrong crash", "wrong wrong"]
    rows = [
        {**row(0, i, verdict), "other": other}
        for i, (verdict, other) in enumerate(map(str.split, pairs))
    ]
    rows.append({**row(0, 6, "infrastructure"), "other": "infrastructure"})
    rows.append(row(0, 7, "pass"))  # made before there was another
    report = build(rows, comparison="official", ks=(1,))
    assert report["comparison"] == "official"
    assert report["other_comparison"] == {
        "name": "strict", "known": 6, "changed": 4, "to_pass": 1, "from_pass": 2,
    }  # fmt: skip
    write_report(report, tmp_path)
    print_report(report)
    said = (
        "utputs compared by official; strict would change 4 of 6 verdicts: 2 from pass, 1 to pass"
    )
    assert said in (tmp_path / "report.md").read_text()
    assert said in capsys.readouterr().out
    assert build(rows, comparison="strict")["other_comparison"]["name"] == "official"
    for older in (build(rows), {k: v for k, v in build(rows).items() if "comparison" not in k}):
        write_report(older, tmp_path)
        print_report(older)
        assert "compared by" not in (tmp_path / "report.md").read_text() + capsys.readouterr().out


def test_published_rows_are_only_beside_their_own_benchmark():
    rows = results(0, ["pass"])
    (first, *_) = build(rows)["published"]
    assert first["pass_at_k"] == {"1": 0.316, "10": 0.573, "100": 0.862}
    toy = HumanEvalTask("toy/1", "", "", "", "")
    assert build([], tasks=[toy])["published"] == []


def test_nothing_to_score(tmp_path):
    report = build([], references=[{**row(0, 0, "crash")}])
    assert (report["problems"], report["pass_at_k"], report["omitted_k"]) == (0, {}, [1, 2, 5])
    write_report(report, tmp_path)
    assert "nothing to report" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report.png").exists()


HELDOUT = {
    "tokens": 1000,
    "acceptance_length": 2.346,
    "per_head": [
        {
            "head": k,
            "tokens": 900 - k,
            "loss": 1.0 + k,
            "top1": 0.6 - k / 10,
            "top5": 0.9 - k / 10,
            "ece": 0.05,
            "calibration": [
                {"low": m / 10, "high": (m + 1) / 10, "tokens": 9, "confidence": c, "accuracy": a}
                for m, c, a in ((1, 0.12, 0.2), (5, 0.55, 0.5), (9, 0.97, 0.9 - k / 10))
            ],
        }
        for k in range(4)
    ],
    "by_token_class": [
        {
            "class": "keyword",
            "share": 0.25,
            "tokens": [9, 0],
            "loss": [1.0, None],
            "top1": [1, None],
        }
    ],
}
# A text of one token, and a model without extra heads.
NOTHING = {"head": 0, "tokens": 0, "loss": None, "top1": None, "top5": None, "ece": None}
EMPTY_HELDOUT = {"tokens": 1, "per_head": [{**NOTHING, "calibration": []}], "by_token_class": []}
DECODING = {
    "identical": True,
    "tokens_per_forward": 2.5,
    "plain_tokens_per_s": 100.0,
    "self_speculative_tokens_per_s": 220.0,
    "acceptance_per_head": [0.7, 0.5, 0.3],
}


@pytest.fixture
def full():
    rows = results(0, ["pass", "wrong"], 0.1) + results(1, ["memory", "pass"], 0.1)
    rows += results(0, ["pass", "pass"], 0.8) + results(1, ["infrastructure", "crash"], 0.8)
    references = [{**row(3, 0, "wrong"), "detail": "Traceback\n  assert 1 | 2\n"}]
    report = build(rows, references=references, tasks=[*map(task, range(4)), task(9, None)])
    extra = {"settings": {"top_p": 0.95, "temperatures": [0.1, 0.8]}, "machine": "2 cores"}
    return {**report, **HELDOUT, **DECODING, **extra}


def test_files(tmp_path, full):
    folder = tmp_path / "new/folder"
    write_report(full, folder)
    assert json.loads((folder / "report.json").read_text()) == full
    assert imread(folder / "report.png").shape[2] == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.json",
        "report.md",
        "report.png",
    ]
    page = (folder / "report.md").read_text()
    for line in (
        "| published, not run here: 7B, 1T tokens of code, n=4 | 31.6 % |  | 57.3 % | 86.2 % |",
        "neither the number of shots nor top-p",
        "headline in report.json is at temperature 0.1, the first of the config",
        "| HumanEval/3 | wrong | assert 1 \\| 2 |",
        "| sandbox tier | bubblewrap |",
        "| sandbox self-test | network yes |",
        "| settings: temperatures | 0.1, 0.8 |",
        "| machine | 2 cores |",
        "1 sample not counted: a fault of this machine",
        "1 problem without a Python 3 solution",
        "| 3 | 897 | 4.0000 | 30.0% | 60.0% | 0.0500 |",
        "| keyword | 25.0% | 1.0000 |  |",
        "Acceptance length 2.35: one plus",
        "| acceptance of head 3 | 30.0% |",
        "| same text as plain decoding | yes |",
    ):
        assert line in page


EMPTY_DECODING = {
    "identical": True,
    "tokens_per_forward": None,
    "plain_tokens_per_s": 100.0,
    "self_speculative_tokens_per_s": 100.0,
    "acceptance_per_head": [None, None, None],
}


@pytest.mark.parametrize("part", [HELDOUT, DECODING, EMPTY_HELDOUT, EMPTY_DECODING])
def test_report_of_a_model_alone(tmp_path, part, capsys):
    write_report(part, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == part
    measured = part in (HELDOUT, DECODING)
    assert (tmp_path / "report.png").exists() == measured
    assert "pass@k" not in (tmp_path / "report.md").read_text()
    print_report(part)
    assert bool(capsys.readouterr().out) == measured


def test_a_difference_in_decoding_comes_with_its_gap(tmp_path):
    gaps = [{"logit_gap": 0.0156}, {"logit_gap": None}, {"logit_gap": 0.25}]
    write_report({**DECODING, "identical": False, "differences": gaps}, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| same text as plain decoding | no |" in page
    assert "| differences, largest logit gap | 3, 0.2500 |" in page


def test_what_was_there_stays_if_writing_fails(tmp_path, monkeypatch):
    write_report(DECODING, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report({**DECODING, "identical": False}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({**DECODING, "plain_tokens_per_s": float("nan")}, tmp_path)


def test_print(full, capsys):
    print_report(full)
    out = capsys.readouterr().out
    assert "humaneval: 2 problems, tier bubblewrap, 4 pass, 1 wrong, 1 memory" in out
    assert "pass@1 at temperature 0.1: 50.0 % [50.0, 50.0]" in out
    assert "omitted, too few samples: pass@5" in out
    assert "acceptance length on held-out text: 2.35" in out
    assert "not scored, its reference fails here: HumanEval/3: wrong" in out


def test_verdicts_have_a_colour_each():
    assert len(set(VERDICT_COLOURS.values())) == len(VERDICT_COLOURS) == 9


def test_intervals_are_drawn_for_every_temperature(full):
    from wmtp_modules.reports.evaluation_figure import draw_report

    axis = draw_report(full).axes[0]
    drawn = [container.lines[0].get_ydata().astype(float) for container in axis.containers]
    values = [[f["value"] for f in at["pass_at_k"].values()] for at in full["by_temperature"]]
    for line, expected in zip(drawn, values, strict=True):
        np.testing.assert_allclose(line, expected)
