"""Controls as named sets of overrides: what each run's config becomes, and what is refused."""

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.check import ConfigError
from wmtp_modules.run.controls import check_all, control_runs, name_of, overrides_of, runs_of

WEIGHTINGS = ("rho1", "uniform", "random_topk", "dft")
CFG = {
    "output_dir": "out",
    "seed": 0,
    "max_steps": 50,
    "weighting": {"name": "rho1", "ratio": 0.5},
    "dataset": {"_component_": "rows", "source": "a", "split": "train"},
    "dataset_val": {"_component_": "rows", "source": "b"},
    "optimizer": {"_component_": "adamw", "lr": 0.1, "betas": [0.9, 0.95]},
    "metric_logger": {"run_name": "7b_${weighting.name}", "port": 3},
}


def runs(controls, **more):
    return list(control_runs(OmegaConf.create(CFG | more | {"controls": controls}), WEIGHTINGS))


def test_controls_are_the_config_under_other_weightings():
    """Each once, and not the run itself, which a user may have set to one of them."""
    made = runs(
        ["uniform", "random_topk", "dft", "dft"], weighting={"name": "uniform", "ratio": 0.5}
    )
    assert [run.weighting.name for run in made] == ["random_topk", "dft"]
    assert [run.output_dir for run in made] == ["out/controls/random_topk", "out/controls/dft"]
    assert all(run.weighting.ratio == 0.5 for run in made)
    assert [*map(name_of, made)] == ["random_topk", "dft"]
    assert overrides_of(made[1]) == {"weighting.name": "dft"}
    assert not any("control" in run or run.controls for run in made)  # as before there were sets
    assert runs(None) == []


SETS = {
    "uniform": None,
    "dft": {"max_steps": 160},
    "uniform_good": {"weighting.name": "uniform", "policy_rewards_above": 0},
    "sharper": {"weighting": {"ratio": 0.1}},
}


@pytest.mark.parametrize("controls", [SETS, ["uniform", *({k: SETS[k]} for k in list(SETS)[1:])]])
def test_a_set_is_the_config_under_its_overrides(controls):
    made = {name_of(run): run for run in runs(controls)}
    assert list(made) == list(SETS)
    assert {name: run.output_dir for name, run in made.items()} == {
        name: f"out/controls/{name}" for name in SETS
    }
    found = {
        name: (one.weighting.name, one.weighting.ratio, one.max_steps) for name, one in made.items()
    }
    assert found == {
        "uniform": ("uniform", 0.5, 50),
        "dft": ("dft", 0.5, 160),  # the name of a weighting means it
        "uniform_good": ("uniform", 0.5, 50),
        "sharper": ("rho1", 0.1, 50),  # the run's own
    }
    assert made["uniform_good"].policy_rewards_above == 0
    assert {name: overrides_of(run) for name, run in made.items()} == {
        "uniform": {"weighting.name": "uniform"},
        "dft": {"weighting.name": "dft", "max_steps": 160},
        "uniform_good": {"weighting.name": "uniform", "policy_rewards_above": 0},
        "sharper": {"weighting.ratio": 0.1},
    }
    loggers = {name: run.metric_logger for name, run in made.items()}
    assert loggers["sharper"] == {"run_name": "7b_sharper", "port": 3}
    assert {name: one.run_name for name, one in loggers.items()} == {n: f"7b_{n}" for n in SETS}


def test_the_run_itself_comes_last():
    cfg = OmegaConf.create(
        CFG | {"controls": {"uniform": None, "sharper": {"weighting.ratio": 0.1}}}
    )
    assert [*map(name_of, runs_of(cfg, WEIGHTINGS))] == ["uniform", "sharper", "rho1"]
    assert runs_of(cfg, WEIGHTINGS)[-1] is cfg


def test_what_a_control_keeps_of_a_block():
    """All but what it changes; of one that builds something else nothing."""
    sgd = {"optimizer": {"_component_": "sgd", "lr": 1.0}}
    (one, two, three) = runs(
        {
            "other_text": {"dataset": {"source": "c"}},
            "sgd": sgd,
            "slow": {"optimizer.lr": 0.01, "optimizer._component_": "adamw"},
        }
    )
    assert one.dataset == {"_component_": "rows", "source": "c", "split": "train"}
    assert two.optimizer == sgd["optimizer"]
    assert three.optimizer == CFG["optimizer"] | {"lr": 0.01}


def test_overrides_may_name_other_keys_and_hold_no_secret():
    (run,) = runs(
        {"a": {"dataset.source": "${tables}/x", "note": "https://me:open-sesame@host"}}, tables="/t"
    )
    assert run.dataset.source == "/t/x"
    assert overrides_of(run) == {"dataset.source": "/t/x", "note": "https://***@host"}


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"a/b": {"max_steps": 1}}, "the name 'a/b' cannot be a folder's: take letters"),
        ({"..": {"max_steps": 1}}, r"the name '\.\.' cannot be a folder's"),
        ([""], "the name '' cannot be"),
        ({"long": 160}, r"controls\.long: must be a block of overrides such as .*, got 160"),
        ({"good": "uniform"}, r"controls\.good: must be a block of overrides such as"),
        ({"good": ["uniform"]}, r"controls\.good: must be a block of overrides such as"),
        (
            [{"long": None, "max_steps": 160}],
            r"controls\[0\]: must be a name, or one name with its",
        ),
        (["uniform", 3], r"controls\[1\]: must be a name.*got 3"),
        ({"rho1": {"max_steps": 3}}, "'rho1' is already the run itself: give this control another"),
        ({"base": {"max_steps": 3}}, "'base' is already the model before training"),
        (["uniform", {"uniform": {"max_steps": 3}}], "'uniform' is already another control"),
        ([{"a": {"max_steps": 3}}, {"a": {"max_steps": 4}}], "'a' is already another control"),
        ({"dft": {"weighting.name": "uniform"}}, "'uniform' under the name of another weighting"),
        (
            {"a": {"weighting": {"ratio": 0.1}, "weighting.ratio": 0.2}},
            "weighting.ratio: is there tw",
        ),
        ({"a": {"weighting": None, "weighting.ratio": 0.2}}, "weighting.ratio: is there twice"),
        ({"a": {"weighting.ratio": 0.2, "weighting": None}}, "weighting: is there twice"),
        ({"a": {"weighting..ratio": 0.2}}, r"controls\.a: 'weighting\.\.ratio' is not a key"),
        ({"a": {"optimizer.betas[0]": 0.2}}, r"'optimizer\.betas\[0\]' is not a key"),
        ({"a": {"optimizer.betas.x": 0.2}}, r"controls\.a: .* do not fit the config: "),
        ({"a": {"": 0.2}}, r"controls\.a: '' is not a key"),
        (
            {"a": {"output_dir": "x"}},
            r"controls\.a\.output_dir: no control may change it: its folder",
        ),
        ({"a": {"controls": ["dft"]}}, "no control may change it: its folder"),
        ({"a": {"control.name": "b"}}, "no control may change it"),
        ({"a": {"seed": 1}}, "seed: no control may change it: all runs of a config begin from the"),
        ({"a": {"checkpointer.checkpoint_dir": "x"}}, "begin from the same start"),
        (
            {"a": {"model": {"n_future_tokens": 1}}},
            r"a\.model\.n_future_tokens: no.*the same start",
        ),
        ({"a": {"dataset_val.source": "x"}}, "held-out losses compare only on the same text"),
        ({"a": {"tokenizer": {"max_seq_len": 8}}}, "held-out losses compare only"),
        ({"a": {"dtype": "bf16"}}, "held-out losses compare only"),
        ({"a": {"resume_from_checkpoint": True}}, "it holds for all runs of a config together"),
        ({"a": {"prepare": None}}, "it holds for all"),
        ({"a": {"requires": []}}, "it holds for all"),
        ({"a": {"replay": "x"}}, "it holds for all"),
        ({"a": {"max_hours": 3}}, "it holds for all"),
    ],
)
def test_what_is_no_control(controls, message):
    with pytest.raises(ConfigError, match=message):
        runs(controls)


def test_what_is_made_once_for_all_policies_is_no_controls(monkeypatch):
    for key in ("stages", "dataset", "rewards", "critic", "value_table"):
        with pytest.raises(ConfigError, match=rf"a\.{key}.x: no control.*made once, for all runs"):
            runs({"a": {f"{key}.x": 1}}, stages=["policy"])


def test_heldout_text_does_not_change_by_way_of_another_key():
    """It may take over what the training text has."""
    val = {"_component_": "rows", "source": "${dataset.source}", "split": "validation"}
    with pytest.raises(ConfigError, match=r"a: changes dataset_val too, .*: write its value out"):
        runs({"a": {"dataset.source": "c"}}, dataset_val=val)
    (run,) = runs({"a": {"dataset.split": "c"}}, dataset_val=val)
    assert run.dataset_val.source == "a"
    # The folder is another one anyway, whatever lies there.
    assert (
        len(runs({"a": {"max_steps": 3}}, checkpointer={"checkpoint_dir": "${output_dir}/x"})) == 1
    )


def test_errors_of_a_control_are_headed_by_its_name():
    cfg = OmegaConf.create(CFG | {"controls": {"a": {"max_stps": 3}, "b": {"max_steps": 3}}})

    def told(*errors):
        def check(one):
            if name_of(one) == "a":
                raise ValueError(*errors)

        with pytest.raises(ConfigError) as found:
            check_all(cfg, WEIGHTINGS, check)
        return str(found.value)

    assert told("max_stps: unknown key") == "controls.a.max_stps: unknown key"
    assert told("weighting.ratio must be above 0") == "controls.a.weighting.ratio must be above 0"
    assert told("w_min 3 and w_max 2") == "controls.a: w_min 3 and w_max 2"
    two = "2 errors\n  max_stps: unknown key\n  seed: missing"
    assert told(two) == "2 errors\n  controls.a.max_stps: unknown key\n  controls.a.seed: missing"
    check_all(cfg, WEIGHTINGS, lambda one: None)


def test_faults_of_a_run_and_of_its_controls_come_at_once_and_once():
    """A control has the run's faults as well; one that is not to be made hides no other."""
    controls = {
        "a": {"max_stps": 3},
        "b": {"seed": 1},
        "no name": None,
        "c": {"weighting.ratio": 2},
        "d": {"max_steps": 7},
        "base": {"max_steps": 7},
    }
    cfg = OmegaConf.create(CFG | {"sede": 1, "controls": controls})

    def check(one):
        wrong = [f"{key}: unknown key" for key in one if key in ("sede", "max_stps")]
        wrong += ["weighting.ratio: at most 1"] * (one.weighting.ratio > 1)
        if wrong:
            raise ValueError("\n".join(["errors", *wrong]))

    with pytest.raises(ConfigError) as found:
        check_all(cfg, WEIGHTINGS, check)
    first, *lines = str(found.value).splitlines()
    assert first == f"{len(lines)} errors"
    assert [line.split(": ")[0] for line in lines] == [
        *("  sede", "  controls.a.max_stps", "  controls.b.seed", "  controls"),
        *("  controls.c.weighting.ratio", "  controls.base"),
    ]


@pytest.mark.parametrize(
    "more", [{"weighting": 3}, {"seed": "${none}"}, {"output_dir": 3}, {"controls": 3}]
)
def test_what_controls_are_made_from_may_be_wrong_itself(more):
    cfg = OmegaConf.create(CFG | {"controls": {"a": {"max_steps": 3}}} | more)

    def check(one):
        raise ValueError("it is wrong")

    with pytest.raises(ConfigError, match=r"^it is wrong$"):
        check_all(cfg, WEIGHTINGS, check)
