"""The critic's commands: forked starts, which test_tune_run.py compares to real ones."""

import json

import pytest
from safetensors.torch import load_file

RECIPE = "recipes/critic_wmtp_distributed.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(fork_server, tiny_quickstarts):
    """README's command in a few steps, which a critic learns little in."""
    config = tiny_quickstarts.config(
        "critic",
        allow_uninformative_critic=True,
        **{"critic.max_steps": 10, "critic.eval_every_n_steps": 5},
    )
    done = fork_server.run([RECIPE, "--config", config], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return done, tiny_quickstarts.folder, config


def test_the_quickstart_tells_everything_and_where_it_is(quickstart):
    done, folder, _ = quickstart
    summary = json.loads((folder / "critic" / "summary.json").read_text())
    figures = {"pair_accuracy", "length_only", "token_table", "cross_entropy", "constant"}
    assert figures | {"mean_value", "auc_spoiled"} <= summary["critic"].keys()
    assert {"start", "end", "good_share"} <= summary["critic"]["mean_value"].keys()
    of_tokens = {"critic", "token_table", "lm_loss", "position"}
    assert summary["critic"]["auc_spoiled"].keys() == of_tokens
    runs = ["base", "uniform", "uniform_good", "shuffled", "oracle", "critic"]
    assert [*summary["heldout_loss"]] == runs
    assert all(len(loss) == 4 for loss in summary["heldout_loss"].values())
    assert summary["weight_on_spoiled"].keys() == {"data", "critic"}
    assert summary["controls"]["uniform_good"]["policy_rewards_above"] == 0
    for words in ("length alone", "token counts", "mean V", "AUC between sound and spoiled tokens"):
        assert words in done.stdout
    for name in runs:
        assert f"\n  {name} " in done.stdout
    critic = folder / "critic" / "critic"
    for what in (
        *(critic / name for name in ("calibration.png", "weights.html")),
        *(folder / "critic" / name for name in ("best", "curves.png", "summary.json")),
    ):
        assert str(what) in done.stdout
        assert what.exists()


@pytest.mark.nightly
def test_two_ranks_equal_one_process(quickstart, forks, tiny_quickstarts, tmp_path):
    """Same joint batches, shared by two ranks or not: critic, values, advantages and weights."""
    config = tiny_quickstarts.config(
        "critic",
        max_steps=3,
        run_val_every_n_steps=3,
        controls=None,
        allow_uninformative_critic=True,
        **{"critic.max_steps": 6, "critic.eval_every_n_steps": 3},
    )
    lines, records, heads = {}, {}, {}
    for ranks, share in ((2, 1), (None, 2)):
        output = tmp_path / f"ranks_{ranks}"
        done = forks.run(
            [
                *(RECIPE, "--config", config, f"output_dir={output}"),
                f"rewards.table_dir={output}/rewards",
                f"critic.checkpoint_dir={output}/critic",
                f"value_table.table_dir={output}/values",
                f"critic.batch_size={8 * share}",
                f"batch_size={2 * share}",
            ],
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        text = (output / "metrics.jsonl").read_text()
        lines[ranks] = [json.loads(line) for line in text.splitlines()]
        records[ranks] = json.loads((output / "critic" / "critic.json").read_text())
        heads[ranks] = load_file(output / "critic" / "value_head.safetensors")
    assert records[2]["heldout_losses"] == pytest.approx(records[None]["heldout_losses"], rel=1e-6)
    for key in ("pair_accuracy", "cross_entropy", "auc"):
        got, want = (records[ranks]["report"][key] for ranks in (2, None))
        assert got == pytest.approx(want, rel=1e-5)
    for key, want in heads[None].items():
        assert (heads[2][key] - want).norm() <= 1e-3 * want.norm() + 1e-6, key
    assert len(lines[2]) == len(lines[None]) >= 3
    for two, one in zip(lines[2], lines[None], strict=True):
        for key in one.keys() - {"tokens_per_s", "memory_gib"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_what_a_control_would_hide_is_found_before_it_trains(
    quickstart, forks, tiny_quickstarts, tmp_path
):
    """uniform needs no critic, so it could train for hours before the next run finds none."""
    config = tiny_quickstarts.config("critic")
    done = forks.run([RECIPE, "--config", config, "stages=[policy]", f"output_dir={tmp_path}"])
    assert done.returncode == 1
    assert f"{tmp_path}/critic holds no trained critic: add 'critic' to stages" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "controls").exists()


def test_a_typo_is_one_sentence(forks, tmp_path):
    done = forks.run(
        [
            *(RECIPE, "--config", "configs/quickstart/critic.yaml"),
            *("critic.objektive=pairs", f"output_dir={tmp_path}"),
        ]
    )
    assert done.returncode == 1
    assert "critic.objektive: unknown key (did you mean 'objective'?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_of_several_answers_are_refused_before_anything_is_made(
    quickstart, forks, tiny_quickstarts, tmp_path
):
    """A reward belongs to one answer: which one of a conversation's, nobody can say."""
    said = [
        {"role": role, "content": f"{role} {n}"} for n in "12" for role in ("user", "assistant")
    ]
    rows = [{"messages": said[:2], "reward": 1.0}, {"messages": said, "reward": 0.0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_quickstarts.config("critic")
    places = [f"output_dir={tmp_path}/out", f"rewards.table_dir={tmp_path}/rewards"]
    done = forks.run([RECIPE, "--config", config, f"dataset.source={tmp_path}/rows.jsonl", *places])
    assert done.returncode == 1
    assert (
        "row 1 of the data set has 2 turns of the assistant, and a reward belongs to one response: "
        "give one row for each, or train with the Rho-1 recipe" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("rewards/*/*")) + list(tmp_path.glob("out/*/*"))
