"""What ablation.py runs: models that arms share, settings with their arms, claims to compare.

Everything is a shipped quickstart config with changes (dotted keys). Factors vary one at a time
from the quickstart's own values, the critic's from full weights (``strength`` 1). A seed deals
files or rows to their parts, orders them and initialises the models; all arms of a seed share all
of that, so differences are paired.
"""

import copy
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

CONFIGS = Path("configs/quickstart")
WORK = "runs/ablation"
MEASURES = 1  # what a row holds; another number and every run is made again

# One process does what the quickstart's two do: 2 x its micro-batch. The rest costs time and
# changes no figure.
DISK_LOGGER = {
    "_component_": "torchtune.training.metric_logging.DiskLogger",
    "log_dir": "${output_dir}/logs",
}
LEFT_OUT = ("prepare", "requires", "controls", "assets_dir")  # ablation.py does these itself


@dataclass(frozen=True)
class Model:
    """A model that arms start from or weigh by: a base, a reference, a critic with its values."""

    config: str
    changes: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # other models of its family
    prepare: tuple[tuple[str, dict], ...] = ()  # data beside the family's


@dataclass(frozen=True)
class Arm:
    """One run of a setting; ``core`` ones are run without ``--all``.

    ``best_of`` names a group of arms that differ in their steps only: comparisons take the best.
    ``prepare`` makes data beside the setting's.
    """

    name: str
    changes: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    core: bool = False
    best_of: str = ""
    prepare: tuple[tuple[str, dict], ...] = ()


@dataclass(frozen=True)
class Family:
    """Data that are dealt once per seed, and the models trained on them.

    ``prepare`` are configs whose ``prepare`` block makes the data, with changes to them; those of
    a setting come after its family's.
    """

    name: str
    title: str
    changes: dict
    prepare: tuple[tuple[str, dict], ...]
    models: dict[str, Model]


@dataclass(frozen=True)
class Setting:
    """Arms that are compared with each other, and the pairs that a claim is about."""

    name: str
    title: str
    about: str
    family: Family
    config: str
    changes: dict
    arms: tuple[Arm, ...]
    comparisons: tuple[tuple[str, str], ...]
    prepare: tuple[tuple[str, dict], ...] = ()


@dataclass(frozen=True)
class Job:
    """One run: an arm of a setting, or a model of a family, with one seed."""

    setting: str
    arm: str
    seed: int
    config: str
    changes: dict
    prepare: tuple[tuple[str, dict], ...]
    needs: tuple["Job", ...] = ()
    is_model: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting, self.arm, self.seed

    @property
    def output_dir(self) -> Path:
        return Path(self.changes["output_dir"])

    def resolved(self) -> DictConfig:
        """The config of this run."""
        cfg = OmegaConf.create(changed(self.config, self.changes))
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        for key in LEFT_OUT:
            cfg.pop(key, None)
        return cfg

    def preparations(self) -> list[DictConfig]:
        """The components that make its data."""
        configs = [OmegaConf.create(changed(name, changes)) for name, changes in self.prepare]
        return [
            OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)).prepare for cfg in configs
        ]

    def definition(self) -> str:
        """Hash of all that shapes its figures: config, data, and the models it uses."""
        parts = {
            "measures": MEASURES,
            "config": changed(self.config, self.changes, drop=LEFT_OUT),
            "prepare": [
                [changes, _shipped(CONFIGS / f"{name}.yaml")["prepare"]]
                for name, changes in self.prepare
            ],
            "needs": [job.definition() for job in self.needs],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _shipped(path: Path) -> dict[str, Any]:
    """A config as it is shipped, interpolations unresolved."""
    return OmegaConf.to_container(OmegaConf.load(path))


def changed(name: str, changes: dict, drop: tuple[str, ...] = ()) -> dict[str, Any]:
    """A shipped config with changes, interpolations unresolved."""
    cfg = copy.deepcopy(_shipped(CONFIGS / f"{name}.yaml"))
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = cfg
        for one in blocks:
            block = block.setdefault(one, {})
        block[last] = value
    return {key: value for key, value in cfg.items() if key not in drop}


def python_version() -> str:
    """Of the interpreter, whose library is the text that is dealt."""
    return sys.version.split()[0]


def _of_seed(changes: dict, seed: int) -> dict:
    """Changes with the seed in place of ``${seed}``, as a number where it stands alone."""
    text = json.dumps(changes).replace('"${seed}"', str(seed)).replace("${seed}", str(seed))
    return json.loads(text)


# ------------------------------------------------------------------ Rho-1's settings

STDLIB = f"{WORK}/stdlib_${{seed}}"
MTP, NEXT, NEXT_LONG = "MTP reference", "next-token reference", "next-token reference, equal time"
# Steps after which the next-token reference has taken the processor time of the MTP one.
EQUAL_TIME_STEPS = 1230
ONE_HEAD = {"model.n_future_tokens": 1, "model.num_layers": 3}
FOUR_HEADS = {"model.n_future_tokens": 4, "model.num_layers": 6}


def _reference(folder: str, **changes) -> Model:
    to = {"output_dir": f"{STDLIB}/{folder}", "checkpointer": None}
    return Model("reference", to | changes)


STDLIB_FAMILY = Family(
    "stdlib",
    "Models that the arms on lines of source share",
    {"assets_dir": STDLIB},
    (("rho1", {"assets_dir": STDLIB, "prepare.seed": "${seed}"}),),
    {
        "base": Model("base", {"output_dir": f"{STDLIB}/base"}),
        "base of one head": Model("base", {"output_dir": f"{STDLIB}/base_one"} | ONE_HEAD),
        MTP: _reference("reference_mtp", **FOUR_HEADS),
        NEXT: _reference("reference_next", **ONE_HEAD),
        NEXT_LONG: _reference("reference_long", **ONE_HEAD, max_steps=EQUAL_TIME_STEPS),
    },
)
REFERENCE_FOLDERS = {MTP: "reference_mtp", NEXT: "reference_next", NEXT_LONG: "reference_long"}


def rho1_arm(name: str, reference: str, **weighting) -> Arm:
    """An arm that weighs by a reference, which scores what is trained on: no table to share."""
    changes = {
        "weighting.name": "rho1",
        "reference.mode": "online",
        "reference.checkpointer.checkpoint_dir": f"{STDLIB}/{REFERENCE_FOLDERS[reference]}/last",
    }
    changes |= {f"weighting.{key}": value for key, value in weighting.items()}
    return Arm(name, changes, ("base", reference))


def control_arm(name: str) -> Arm:
    return Arm(name, {"weighting.name": name}, ("base",))


def _rho1_arms(core: tuple[str, ...]) -> tuple[Arm, ...]:
    one_head = ONE_HEAD | {"checkpointer.checkpoint_dir": f"{STDLIB}/base_one/last"}
    topk_one = rho1_arm("topk, one head", NEXT)
    shuffled = rho1_arm("shuffled", MTP)
    arms = [
        control_arm("uniform"),
        control_arm("random_topk"),
        rho1_arm(f"topk, {MTP}", MTP),
        rho1_arm(f"topk, {NEXT}", NEXT),
        rho1_arm(f"topk, {NEXT_LONG}", NEXT_LONG),
        replace(shuffled, changes=shuffled.changes | {"weighting.name": "shuffled"}),
        control_arm("dft"),
        control_arm("top_loss"),
        rho1_arm(f"soft, {MTP}", MTP, selection="soft"),
        rho1_arm(f"soft, {NEXT}", NEXT, selection="soft"),
        rho1_arm("abs_excess", MTP, score="abs_excess"),
        rho1_arm("topk, strength 0.25", MTP, strength=0.25),
        rho1_arm("topk, strength 0.5", MTP, strength=0.5),
        rho1_arm("topk, strength 0.75", MTP, strength=0.75),
        Arm("uniform, one head", {"weighting.name": "uniform"} | one_head, ("base of one head",)),
        replace(topk_one, changes=topk_one.changes | one_head, needs=("base of one head", NEXT)),
    ]
    return tuple(replace(arm, core=arm.name in core) for arm in arms)


RHO1_COMPARISONS = (
    (f"topk, {MTP}", f"topk, {NEXT}"),
    (f"topk, {MTP}", f"topk, {NEXT_LONG}"),
    (f"soft, {MTP}", f"soft, {NEXT}"),
    (f"topk, {MTP}", "random_topk"),
    (f"topk, {MTP}", "shuffled"),
    (f"topk, {NEXT}", "shuffled"),
    (f"soft, {MTP}", "shuffled"),
    ("top_loss", "random_topk"),
    (f"topk, {MTP}", "abs_excess"),
    ("topk, one head", "uniform, one head"),
)
TOPK = (f"topk, {MTP}", f"topk, {NEXT}", f"topk, {NEXT_LONG}")
CLEAN = f"{WORK}/clean_${{seed}}"

CORRUPTED = Setting(
    "corrupted",
    "Corrupted lines",
    "Rho-1's quickstart: 40 % of the lines that train the model are random tokens, the held-out "
    "text is clean. Base and references have the quickstart's steps on files of their own. "
    "`shuffled`, `abs_excess` and the strengths take the MTP reference's scores.",
    STDLIB_FAMILY,
    "rho1",
    {"assets_dir": STDLIB},
    (*_rho1_arms(core=("uniform", "random_topk", *TOPK)), control_arm("oracle")),
    RHO1_COMPARISONS,
)
CLEAN_TEXT = Setting(
    "clean",
    "Clean text of other files",
    "The same models and files, without a corrupted line: does weighting cost anything where "
    "nothing is noise?",
    STDLIB_FAMILY,
    "rho1",
    {"assets_dir": STDLIB, "dataset.source": f"{CLEAN}/finetune.jsonl"},
    _rho1_arms(core=("uniform", *TOPK)),
    RHO1_COMPARISONS,
    (("rho1", {"assets_dir": CLEAN, "prepare.seed": "${seed}", "prepare.corrupted_share": 0.0}),),
)


# ---------------------------------------------------------------------- critic's settings

SPOILED, PLENTY = f"{WORK}/spoiled_${{seed}}", f"{WORK}/plenty_${{seed}}"
FILTER_STEPS = (20, 40, 80, 160)  # of uniform_good; the best of them counts
ADVANTAGES = ("relative", "gated", "ratio", "td", "gae")
BASE_OF_CRITIC = {
    "allow_uninformative_critic": True,
    "assets_dir": SPOILED,
    "tokenizer.path": f"{SPOILED}/tokenizer.model",
    "checkpointer.checkpoint_dir": f"{SPOILED}/base/last",
}
# More responses of the same law: the one thing that differs, and the same critic serves. The other
# parts are not used.
PLENTY_DATA = (
    "critic",
    {
        "assets_dir": PLENTY,
        "prepare.seed": "${seed}",
        "prepare.n_policy": 900,
        "prepare.n_critic": 10,
        "prepare.n_heldout": 10,
    },
)
# The policy's very responses as they were written, but for one: a part has good ones and bad ones.
SOUND = f"{WORK}/sound_${{seed}}"
SOUND_DATA = (
    "critic",
    {"assets_dir": SOUND, "prepare.seed": "${seed}", "prepare.bad_share": 0.004},
)
PLENTY_ROWS = {"dataset.source": f"{PLENTY}/policy.jsonl"}
PLENTY_PLACES = {
    "rewards.table_dir": f"{PLENTY}/made/rewards",
    "critic.checkpoint_dir": f"{SPOILED}/critic_turn/critic",
    "value_table.table_dir": f"{PLENTY}/made/values",
}


def _critic_in(folder: str, **critic) -> dict:
    """Where a critic and its values are, and how it is trained."""
    places = {
        "rewards.table_dir": f"{folder}/rewards",
        "critic.checkpoint_dir": f"{folder}/critic",
        "value_table.table_dir": f"{folder}/values",
    }
    return places | {f"critic.{key}": value for key, value in critic.items()}


def _critic(folder: str, start: dict, **critic) -> Model:
    """A critic that judges; what it does not know is a figure here, not an end."""
    stages = {"stages": ["rewards", "critic", "values"], "output_dir": folder}
    changes = start | _critic_in(folder, **critic) | stages
    return Model("critic", changes, ("base",))


def _weighed(name: str, critic: str, places: dict, weighting: str, core: bool, **more) -> Arm:
    """A policy beside a critic; also one that does not weigh by it reads its rewards."""
    more = {f"weighting.{key}": value for key, value in more.items()}
    return Arm(name, {"weighting.name": weighting} | places | more, ("base", critic), core)


def _filters(critic: str, places: dict, core: tuple[int, ...]) -> tuple[Arm, ...]:
    arms = []
    for steps in FILTER_STEPS:
        changes = places | {"policy_rewards_above": 0, "max_steps": steps}
        arm = _weighed(f"uniform_good, {steps} steps", critic, changes, "uniform", steps in core)
        arms.append(replace(arm, best_of="uniform_good"))
    return tuple(arms)


def _unspoiled(places: dict) -> Arm:
    """What spoiling costs at all: about what a weighting of spoiled text could win at most."""
    changes = places | {
        "stages": ["rewards", "policy"],
        "dataset.source": f"{SOUND}/policy.jsonl",
        "rewards.table_dir": f"{SOUND}/rewards",
    }
    arm = _weighed("uniform, nothing spoiled", "critic", changes, "uniform", True)
    return replace(arm, prepare=(SOUND_DATA,))


STATE = {"head": "state"}
PAIRS = {"objective": "pairs", "head": None}  # where a problem has good and bad responses
PLENTY_VALUES = "the critic's values, plenty"
SPOILED_FAMILY = Family(
    "spoiled",
    "Models that the critic's arms share",
    {"assets_dir": SPOILED},
    (("critic", {"assets_dir": SPOILED, "prepare.seed": "${seed}"}),),
    {
        "base": Model("critic_base", {"output_dir": f"{SPOILED}/base"}),
        "critic": _critic(f"{SPOILED}/critic_turn", BASE_OF_CRITIC),
        "critic, state head": _critic(f"{SPOILED}/critic_state", BASE_OF_CRITIC, **STATE),
        PLENTY_VALUES: Model(
            "critic",
            BASE_OF_CRITIC
            | PLENTY_ROWS
            | PLENTY_PLACES
            | {"stages": ["rewards", "values"], "output_dir": f"{PLENTY}/made"},
            ("base", "critic"),
            (PLENTY_DATA,),
        ),
    },
)


def _critic_arms() -> tuple[Arm, ...]:
    turn = _critic_in(f"{SPOILED}/critic_turn")
    state = _critic_in(f"{SPOILED}/critic_state", **STATE)
    return (
        _weighed("uniform", "critic", turn, "uniform", True),
        *_filters("critic", turn, core=(20, 40, 80)),
        _weighed("shuffled", "critic", turn, "shuffled", True),
        _weighed("value", "critic", turn, "critic", True, advantage="value"),
        _weighed("oracle", "critic", turn, "oracle", True),
        _unspoiled(turn),
        *(_weighed(name, "critic", turn, "critic", False, advantage=name) for name in ADVANTAGES),
        *(
            _weighed(f"value, strength {x}", "critic", turn, "critic", False, strength=x)
            for x in (0.25, 0.5, 0.75)
        ),
        _weighed("shuffled, strength 0.5", "critic", turn, "shuffled", False, strength=0.5),
        _weighed("oracle, strength 0.5", "critic", turn, "oracle", False, strength=0.5),
        _weighed("value, state head", "critic, state head", state, "critic", False),
    )


CRITIC_COMPARISONS = (
    ("value", "uniform"),
    ("value", "uniform_good"),
    ("value", "shuffled"),
    ("value", "oracle"),
    ("uniform_good", "uniform"),
    ("uniform, nothing spoiled", "uniform"),
    ("uniform, nothing spoiled", "oracle"),
    *((name, "shuffled") for name in ADVANTAGES),
    *((name, "value") for name in ADVANTAGES),
    *(("value, strength 0.5", name) for name in ("uniform", "uniform_good", "value")),
    ("value, strength 0.5", "shuffled, strength 0.5"),
    ("value, strength 0.5", "oracle, strength 0.5"),
    ("value, state head", "value"),
    ("value, state head", "shuffled"),
)
SCARCE = Setting(
    "scarce",
    "Critic, good responses scarce",
    "The critic's quickstart: 300 responses train the policy, 80 % of them spoiled from some line "
    "on; the critic learned from 2,500 others, by labels of whole responses. Held-out loss is on "
    "good responses. One critic per seed serves all its arms.",
    SPOILED_FAMILY,
    "critic",
    BASE_OF_CRITIC | {"stages": ["policy"]},
    _critic_arms(),
    CRITIC_COMPARISONS,
)
PLENTIFUL = Setting(
    "plenty",
    "Critic, good responses plenty",
    "The same with 900 responses for the policy instead of 300: 180 good ones are plenty for so "
    "few steps. The mathematics promises the critic less variance than the filter, not "
    "another optimum.",
    SPOILED_FAMILY,
    "critic",
    BASE_OF_CRITIC | PLENTY_ROWS | {"stages": ["policy"]},
    (
        _weighed("uniform", PLENTY_VALUES, PLENTY_PLACES, "uniform", True),
        *_filters(PLENTY_VALUES, PLENTY_PLACES, core=(80, 160)),
        _weighed("shuffled", PLENTY_VALUES, PLENTY_PLACES, "shuffled", False),
        _weighed("value", PLENTY_VALUES, PLENTY_PLACES, "critic", True),
        _weighed("oracle", PLENTY_VALUES, PLENTY_PLACES, "oracle", False),
    ),
    CRITIC_COMPARISONS,
    (PLENTY_DATA,),
)

MUTATED = f"{WORK}/mutated_${{seed}}"
MUTATED_START = {
    "allow_uninformative_critic": True,
    "assets_dir": MUTATED,
    "tokenizer.path": f"{MUTATED}/tokenizer.model",
    "checkpointer.checkpoint_dir": f"{MUTATED}/base/last",
}
MUTATED_ROWS = {
    "dataset.source": f"{MUTATED}/train.jsonl",
    "dataset_val.source": f"{MUTATED}/heldout.jsonl",
    "critic.dataset": None,  # the policy's: every function is there twice, good and bad
}
MUTATED_DATA = {
    "_component_": "mutations.prepare_critic_stdlib",  # of this folder
    "assets_dir": MUTATED,
    "vocab_size": 1024,
    "max_tokens": 128,
    "seed": "${seed}",
}


def _mutated_arms() -> tuple[Arm, ...]:
    bce, pairs = (
        MUTATED_ROWS | _critic_in(f"{MUTATED}/critic_{name}", **critic)
        for name, critic in (("turn", {}), ("pairs", PAIRS))
    )
    filtered = _weighed("uniform_good", "critic", bce, "uniform", False)
    return (
        _weighed("uniform", "critic", bce, "uniform", False),
        replace(filtered, changes=filtered.changes | {"policy_rewards_above": 0}),
        _weighed("shuffled", "critic", bce, "shuffled", False),
        _weighed("value", "critic", bce, "critic", False),
        _weighed("shuffled, pairs", "critic, pairs", pairs, "shuffled", False),
        _weighed("value, pairs", "critic, pairs", pairs, "critic", False),
        _weighed("oracle", "critic", bce, "oracle", False),
    )


FUNCTIONS = Setting(
    "mutated",
    "Mutated functions",
    "Functions of the standard library, each beside itself with one place changed, a -> b as often "
    "as b -> a. About 1 % of the tokens are wrong, so that even the oracle can gain next to "
    "nothing: it shows what weights cost where there is nothing to win.",
    Family(
        "mutated",
        "Models that the arms on mutated functions share",
        {"assets_dir": MUTATED},
        (("critic", {"prepare": MUTATED_DATA}),),
        {
            "base": Model("critic_base", {"output_dir": f"{MUTATED}/base"}),
            "critic": _critic(f"{MUTATED}/critic_turn", MUTATED_START | MUTATED_ROWS),
            "critic, pairs": _critic(
                f"{MUTATED}/critic_pairs", MUTATED_START | MUTATED_ROWS, **PAIRS
            ),
        },
    ),
    "critic",
    MUTATED_START | {"stages": ["policy"]},
    _mutated_arms(),
    (
        ("value", "uniform"),
        ("value", "shuffled"),
        ("value, pairs", "uniform"),
        ("value, pairs", "shuffled, pairs"),
        ("value, pairs", "value"),
        ("oracle", "uniform"),
    ),
)

SETTINGS = (CORRUPTED, CLEAN_TEXT, SCARCE, PLENTIFUL, FUNCTIONS)


# ---------------------------------------------------------------------- the jobs of a grid


def common(config: str, seed: int) -> dict:
    """Changes of every run: one process, one seed, figures at every step, one validation."""
    cfg = _shipped(CONFIGS / f"{config}.yaml")
    changes = {
        "seed": seed,
        "batch_size": 2 * cfg["batch_size"],
        "log_every_n_steps": 1,
        "run_val_every_n_steps": "${max_steps}",
        "save_every_n_steps": "${max_steps}",
        "metric_logger": DISK_LOGGER,
    }
    if "critic" in cfg:
        changes["critic.batch_size"] = 2 * cfg["critic"]["batch_size"]
        changes["weighting.strength"] = 1.0  # factors vary from full weights
    return changes


def model_job(family: Family, name: str, seed: int) -> Job:
    model = family.models[name]
    changes = _of_seed(common(model.config, seed) | family.changes | model.changes, seed)
    needs = tuple(model_job(family, other, seed) for other in model.needs)
    prepare = _data((*family.prepare, *model.prepare), seed)
    return Job(family.name, name, seed, model.config, changes, prepare, needs, is_model=True)


def arm_job(setting: Setting, arm: Arm, seed: int) -> Job:
    folder = "".join(c if c.isalnum() else "_" for c in arm.name)
    to = {"output_dir": f"{WORK}/{setting.name}_{seed}/{folder}"}
    changes = common(setting.config, seed) | setting.changes | arm.changes | to
    needs = tuple(model_job(setting.family, name, seed) for name in arm.needs)
    prepare = _data((*setting.family.prepare, *setting.prepare, *arm.prepare), seed)
    changes = _of_seed(changes, seed)
    return Job(setting.name, arm.name, seed, setting.config, changes, prepare, needs)


def _data(prepare: tuple[tuple[str, dict], ...], seed: int) -> tuple[tuple[str, dict], ...]:
    return tuple((config, _of_seed(changes, seed)) for config, changes in prepare)


def arm_jobs(
    seeds: int, *, full: bool, only: str | None = None, settings: tuple[Setting, ...] = SETTINGS
) -> list[Job]:
    """The arms of a grid, seed by seed, so that every setting has whole seeds early.

    ``only`` is SETTING, or SETTING/ARM, which need not be a core arm. ValueError if there is none.
    """
    names = [f"{setting.name}/{arm.name}" for setting in settings for arm in setting.arms]
    if only and only not in {*names, *(setting.name for setting in settings)}:
        raise ValueError(f"--only {only!r} is no setting or arm; there are: {'; '.join(names)}")
    jobs = []
    for seed in range(seeds):
        for setting in settings:
            for arm in setting.arms:
                name = f"{setting.name}/{arm.name}"
                if only == name or (only in (None, setting.name) and (arm.core or full)):
                    jobs.append(arm_job(setting, arm, seed))
    return jobs
