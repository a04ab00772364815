"""The golden test: whole optimizer steps of both recipes against a replay in float64.

A recipe runs as its users run it, from a config to the files that it leaves, and replay.py does the
same from the mathematics. Compared are what the steps added to all parameters together, and every
figure in metrics.jsonl. Not compared is what is logged of heads without targets.

Of the code under test come, besides the recipes' files, only the names below: which tokens fall
into which micro-batch is read off the model's embedding; the random controls share their drawing of
random numbers with the recipe, and the critic that of its batches and its pairs.
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from wmtp_modules.critic.pairs import joint_batch, make_pairs
from wmtp_modules.weighting.controls import random_keys

pytestmark = pytest.mark.slow  # starts processes

TOLERANCE = 1e-5
# Not of the mathematics: the machine's, the packing's, and what went wrong.
UNCHECKED = {"step", "tokens_per_s", "memory_gib", "skipped_steps", "epoch", "padding_share"}

SGD = {"_component_": "torch.optim.SGD", "lr": 1.0}
# eps far above a gradient's rounding: where a gradient is next to nothing, Adam's step would
# otherwise be rounding itself. It also makes a step depend on the gradient's scale.
ADAMW = {
    "_component_": "torch.optim.AdamW",
    "lr": 0.02,
    "betas": [0.9, 0.95],
    "eps": 1e-3,
    "weight_decay": 0.1,
}
RHO1 = {
    "name": "rho1",
    "score": "excess",
    "selection": "topk",
    "ratio": 0.6,
    "scope": "microbatch",
    "temperature": 0.7,
    "w_min": 0.1,
    "w_max": 2.0,
    "strength": 1.0,
    "decay": 1.0,
}
CRITIC = {
    "name": "critic",
    "advantage": "gae",
    "lam": 0.9,
    "temperature": 0.8,
    "ratio": 0.6,
    "w_min": 0.2,
    "w_max": 2.0,
    "strength": 1.0,
    "decay": 1.0,
}
VALUE = CRITIC | {"advantage": "value", "w_min": 0.0, "w_max": 3.0}
CONTROLS = ["uniform", "random_topk", "shuffled", "dft", "top_loss"]


def draw(n_packs: int, length: int, *, seed: int, step: int) -> torch.Tensor:
    """The recipe's random number of each token of a joint micro-batch."""
    return random_keys(n_packs, length, seed=seed, step=step, device=torch.device("cpu"))


@pytest.fixture
def compare(ranks, assets, replay, tmp_path):
    """compare(recipe, world, overrides): run, replay, and hold the one against the other.

    Returns:
        The replayed runs by the name of their weighting.
    """

    def one(recipe, world, cfg, output, batches, reference, critic, rows):
        run = replay.Run(
            cfg,
            world,
            assets.model,
            rows or assets.rows,
            critic.held_out if critic else assets.rows_val,
            draw=draw,
            reference=replay.Llama(reference) if reference else None,
            critic=critic.parts() if critic else None,
        )
        lines = run(batches)
        logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        name = f"{recipe} {cfg['weighting']['name']}"
        figures = worst_figure(logged, lines)
        got = torch.load(output / "last" / "consolidated.pth", weights_only=True)
        update = error_of_update(got, run)
        print(f"{name}: update {update:.1e}, figures {figures[0]:.1e} ({figures[1]})")
        assert figures[0] <= TOLERANCE, f"{name}: {figures}"
        assert update <= TOLERANCE, f"{name}: the update is off by {update:.1e}"
        check_summary(json.loads((output / "summary.json").read_text()), run, lines)
        return run

    def go(recipe, world, overrides, reference=None, critic=None, rows=None):
        cfg = assets.cfg | {"output_dir": str(tmp_path / "out")} | overrides
        batches = ranks.run(recipe, cfg, world, tmp_path)
        controls = cfg.get("controls", [])
        outputs = {name: tmp_path / "out" / "controls" / name for name in controls}
        outputs[cfg["weighting"]["name"]] = tmp_path / "out"  # after its controls
        each = cfg["max_steps"] * cfg["gradient_accumulation_steps"]
        assert len(batches) == each * len(outputs)
        runs = {}
        for i, (name, output) in enumerate(outputs.items()):
            own = cfg | {"weighting": cfg["weighting"] | {"name": name}}
            part = batches[i * each : (i + 1) * each]
            runs[name] = one(recipe, world, own, output, part, reference, critic, rows)
        return runs

    return go


def worst_figure(logged: list[dict], replayed: list[dict]) -> tuple[float, str]:
    """Largest relative error of what was logged, and where; every figure has to be replayed."""
    assert [line["step"] for line in logged] == [line["step"] for line in replayed]
    worst = (0.0, "none")
    for got, want in zip(logged, replayed, strict=True):
        known = {key for key, value in want.items() if not math.isnan(value)} - UNCHECKED
        # NaN is of a head without targets, or a mean with it: whatever is logged then.
        assert known <= got.keys() <= want.keys() | UNCHECKED, f"step {got['step']}"
        for key in known:
            error = abs(got[key] - want[key])
            error = error / abs(want[key]) if want[key] else error
            worst = max(worst, (error, f"{key} of step {got['step']}"))
    return worst


def error_of_update(after: dict, run) -> float:
    """Relative error, in the Euclidean norm, of what the run added to its parameters."""
    update = run.update()
    assert after.keys() == update.keys()
    difference = torch.cat(
        [(after[key].double() - run.before[key] - update[key]).flatten() for key in update]
    )
    return (difference.norm() / torch.cat([u.flatten() for u in update.values()]).norm()).item()


def check_summary(summary: dict, run, lines: list[dict]) -> None:
    """Held-out losses before and after, the shares of clipped steps and of weight on noise."""
    assert summary["clipped_share"] == sum(run.clipped) / len(run.clipped)
    for name, line in (("base", lines[0]), (run.weighting["name"], lines[-1])):
        heads = [line[f"val_loss_head_{k}"] for k in range(run.model.n_heads)]
        assert summary["heldout_loss"][name] == pytest.approx(heads, rel=TOLERANCE)
    scores = run.weighting["name"] in ("rho1", "shuffled") and "reference" in run.cfg
    assert ("reference" in summary) == scores
    if scores:
        beside = summary["reference"]
        assert beside["heldout_loss"] == pytest.approx(run.reference_heldout(), rel=TOLERANCE)
        assert beside["model_heldout_loss"] == summary["heldout_loss"]["base"]
    if "corrupted_share" in summary:
        in_data, targets, on_noise, weight = run.noise_sums.tolist()
        share = {"data": in_data / targets, "selected": on_noise / weight}
        assert summary["corrupted_share"] == pytest.approx(share, rel=TOLERANCE)


# -------------------------------------------------------------------------------- rho1


@pytest.fixture
def reference(assets, tmp_path):
    """reference(folder, mode): the block of a config."""

    def block(folder: Path, mode: str = "cached") -> dict:
        return {
            "mode": mode,
            "checkpointer": {"checkpoint_dir": str(folder)},
            "table_dir": str(tmp_path / "table"),
            "batch_tokens": 64,
        }

    return block


def test_rho1_topk_and_its_controls(compare, assets, reference):
    """Two ranks and accumulation 2; some packs supervise nothing."""
    runs = compare(
        "rho1",
        2,
        {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "weighting": RHO1,
            "controls": [*CONTROLS, "oracle"],
            "reference": reference(assets.reference),
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 2,
        },
        reference=assets.reference,
    )
    assert runs["rho1"].empty_packs


def test_rho1_soft_with_strength_and_decay(compare, assets, reference):
    """Against an MTP reference."""
    compare(
        "rho1",
        2,
        {
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "weighting": RHO1 | {"selection": "soft", "strength": 0.7, "decay": 0.6},
            "controls": ["shuffled"],
            "reference": reference(assets.mtp_reference),
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 2,
        },
        reference=assets.mtp_reference,
    )


@pytest.mark.parametrize(("scope", "score"), [("rank", "abs_excess"), ("document", "excess")])
def test_rho1_topk_in_smaller_scopes(scope, score, compare, assets, reference):
    """The reference is asked while training."""
    compare(
        "rho1",
        2,
        {
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "weighting": RHO1 | {"scope": scope, "score": score},
            "reference": reference(assets.mtp_reference, "online"),
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 1,
        },
        reference=assets.mtp_reference,
    )


def test_rho1_adamw_with_warmup_clip_and_epochs(compare, assets, reference):
    """Nine steps: three without full rate, each clipped, through more than two epochs."""
    runs = compare(
        "rho1",
        2,
        {
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "weighting": RHO1,
            "reference": reference(assets.reference),
            "optimizer": ADAMW,
            "num_warmup_steps": 3,
            "clip_grad_norm": 0.5,
            "max_steps": 9,
        },
        reference=assets.reference,
    )
    assert runs["rho1"].clipped == [True] * 9
    assert runs["rho1"].times_seen.max() >= 3


def test_heads_apart_that_learn_from_head_0(compare, assets, reference):
    """Two groups, each clipped by its norm; heads of unlike weight; weights known only after."""
    runs = compare(
        "rho1",
        2,
        {
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "extra_heads": "isolated",
            "distill": {"weight": 0.7, "temperature": 1.5},
            "weighting": RHO1 | {"selection": "soft", "decay": 0.6},
            "reference": reference(assets.mtp_reference),
            "optimizer": ADAMW,
            "clip_grad_norm": 0.5,
            "max_steps": 3,
        },
        reference=assets.mtp_reference,
    )
    assert runs["rho1"].clipped == [True] * 3


@pytest.mark.nightly
def test_all_heads_that_learn_from_head_0(compare):
    """What head 0 teaches trains the trunk as well; weights known beforehand."""
    compare(
        "rho1",
        2,
        {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "distill": {"weight": 0.4, "temperature": 2.0},
            "weighting": RHO1 | {"name": "uniform", "decay": 0.8},
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 2,
        },
    )


# Responses whose tokens hold several characters, or a part of one, with what their data say: spans
# [start, end, weight] in characters, one number for the row, or nothing, which is 1.
WEIGHTED = [
    ("def add(self, name):\n", "    return self", [[0, 6, 0.25], [7, 12, 3.0]]),
    ("def f", "or x in self:", [[1, 4, 2.0]]),  # of a token over the boundary only "or" counts
    ("# é", "漢 is 漢", [[0, 1, 4.0], [5, 6, 0.5]]),  # the last character is EOS's as well
    ("if name:\n", "    pass\n", 0.5),
    ("import ", "queue", 2.5),
    ("while 1", ": break", None),
    ("x = ", "(1, 2, 3)", [[0, 9, 0.0]]),
    ("return ", "None\n", [[0, 2, 1.5]]),
]


def weighted_row(replay, processor, prompt: str, response: str, said):
    """A row with the weight of each token: the mean over its characters of the response."""
    text, n = prompt + response, len(prompt)
    if not isinstance(said, list):
        said = [[0, len(response), 1.0 if said is None else said]]
    of_character = [1.0] * len(response)
    for start, end, weight in said:
        of_character[start:end] = [weight] * (end - start)
    of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    tokens, keep, weights, at = [processor.bos_id()], [False], [1.0], 0
    for token in processor.encode(text):
        piece = processor.id_to_piece(token).replace("\u2581", " ")
        size = 1 if processor.is_byte(token) else len(piece.encode())
        own = {i - n for i in of_byte[at : at + size] if i >= n}
        tokens.append(token)
        keep.append(bool(own))
        weights.append(sum(of_character[i] for i in own) / len(own) if own else 1.0)
        at += size
    assert at == len(of_byte)
    tokens.append(processor.eos_id())
    return replay.Row(
        tokens, [*keep, True], [False] * len(tokens), weight=[*weights, of_character[-1]]
    )


def test_weights_of_the_data(compare, assets, replay, tmp_path):
    """From text with spans on: the tokens that they fall on, heads, and mean 1 over all ranks."""
    processor = SentencePieceProcessor(model_file=assets.cfg["tokenizer"]["path"])
    rows = [weighted_row(replay, processor, *one) for one in WEIGHTED]
    assert len({tuple(row.tokens) for row in rows}) == len(rows)
    assert any(w not in (0.0, 0.5, 1.0, 2.5) and w % 0.25 for row in rows for w in row.weight)
    records = [{"prompt": p, "response": r, "weight": w} for p, r, w in WEIGHTED]
    source = tmp_path / "weighted.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    compare(
        "rho1",
        2,
        {
            "dataset": {"_component_": "wmtp_modules.data.rows_dataset", "source": str(source)},
            "batch_size": 1,
            "gradient_accumulation_steps": 2,
            "weighting": {
                "name": "column",
                "w_min": 0.1,
                "w_max": 2.0,
                "strength": 0.8,
                "decay": 0.7,
            },
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 2,
        },
        rows=rows,
    )


# ------------------------------------------------------------------------------ critic


class Stages:
    """What the stages before the policy left, read from their files."""

    def __init__(self, cfg: dict, folder: Path, assets, replay) -> None:
        self.cfg, self._assets, self._replay = cfg, assets, replay
        rewards = torch.tensor([row.reward for row in assets.rows], dtype=torch.float64)
        mean, std = rewards.mean(), rewards.std(correction=0)
        # Standardised above 0, that is above the mean, whatever the deviation.
        self._rewards = ((rewards - mean) / std).tolist()
        self._good = [float(reward > 0) for reward in self._rewards]
        self.held_out = [row for row in assets.rows_val if row.reward > mean]  # whatever trains
        with pa.memory_map(str(folder / "values" / "part-000000.arrow")) as file:
            self.table = pa.ipc.open_stream(file).read_all()["scores"].to_pylist()
        state = load_file(folder / "critic" / "value_head.safetensors")
        self.head = {name: value.double() for name, value in state.items()}
        trunk, critic, seed = replay.Llama(assets.model), cfg["critic"], assets.cfg["seed"]
        critic = critic | {"head": critic["head"] or "sum"}  # that of pairs
        lengths = np.array([len(replay.response_of(row)) for row in assets.rows])
        if critic["objective"] == "pairs":
            problems = [row.problem_id for row in assets.rows]
            items = make_pairs(lengths, np.array(self._good), problems, seed=seed).tolist()
            assert len(items) > 3
        else:
            items = np.flatnonzero(lengths)[:, None].tolist()
        self.trained = replay.trained_critic(
            assets.rows, self._good, trunk, critic, seed, joint_batch, items
        )
        self.values = [
            replay.critic_logits(
                row, replay.critic_features(row, trunk), self.trained, critic["head"]
            )
            .sigmoid()
            .tolist()
            for row in assets.rows
        ]

    def above(self, threshold: float | None) -> "Stages":
        """With the responses that train the policy."""
        threshold = -math.inf if threshold is None else threshold
        self._chosen = [i for i, r in enumerate(self._rewards) if r > threshold]
        return self

    def parts(self):
        """What one run starts from."""
        return self._replay.Critic(self._good, self._chosen, self.values)


@pytest.fixture(scope="module")
def stages_of(ranks, assets, replay, tmp_path_factory):
    """stages_of(head): rewards from a column, a critic of a few steps, its values."""

    @cache
    def make(head: str) -> Stages:
        folder = tmp_path_factory.mktemp("golden_critic")
        blocks = {
            "rewards": {"source": "column", "table_dir": str(folder / "rewards")},
            "critic": {
                "objective": "pairs" if head == "sum" else "bce",
                "head": None if head == "sum" else head,
                "checkpoint_dir": str(folder / "critic"),
                "optimizer": ADAMW | {"lr": 0.05},
                "batch_size": 4 if head == "sum" else 12,
                "max_steps": 5,
                "eval_every_n_steps": 5,
                "patience": 1,
            },
            "value_table": {"table_dir": str(folder / "values"), "batch_tokens": 999},
            "allow_uninformative_critic": True,
        }
        blocks["rewards"]["batch_tokens"] = 999
        of_policy = {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "weighting": CRITIC,
            "optimizer": SGD,
            "clip_grad_norm": 1000.0,
            "max_steps": 2,
        }
        cfg = assets.cfg | of_policy | blocks | {"output_dir": str(folder / "out")}
        ranks.run("critic", cfg | {"stages": ["rewards", "critic", "values"]}, 1, folder)
        return Stages(of_policy | blocks | {"stages": ["policy"]}, folder, assets, replay)

    return make


@pytest.fixture(scope="module")
def stages(stages_of):
    return stages_of("turn")


@pytest.mark.parametrize("head", ["turn", "state", "sum"])
def test_a_critic_and_its_values(stages_of, head):
    """The value head after all its steps, its scale, and V: sums over every place of a turn."""
    stages = stages_of(head)
    got, want = stages.head, stages.trained
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).norm() / value.norm()
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
    assert want["out.weight"].abs().max() > 0.01
    for own, table in zip(stages.values, stages.table, strict=True):
        assert table == pytest.approx(own, rel=TOLERANCE)
    spread = [max(own) - min(own) for own in stages.values if len(own) > 3]
    assert max(spread) > 0.05


@pytest.mark.parametrize(
    "controls",  # with rho1 the others are held above, and need nothing of a critic
    [["shuffled", "oracle"], pytest.param(CONTROLS, marks=pytest.mark.nightly)],
    ids=["of tokens", "all"],
)
def test_critic_value_and_its_controls(controls, compare, stages):
    """Every response trains the policy, on two ranks with accumulation 2."""
    compare(
        "critic",
        2,
        stages.cfg
        | {
            "weighting": VALUE,
            "policy_rewards_above": None,
            "controls": controls,
            "max_steps": 1,
        },
        critic=stages.above(None),
    )


@pytest.mark.parametrize(
    "advantage", ["relative", "gated", pytest.param("ratio", marks=pytest.mark.nightly)]
)
def test_critic_quotients(advantage, compare, stages):
    """Bounds on both sides, some strength, and heads of unlike weight."""
    more = {"advantage": advantage, "w_min": 0.4, "w_max": 1.3, "strength": 0.8, "decay": 0.7}
    compare(
        "critic",
        2,
        stages.cfg | {"weighting": VALUE | more, "policy_rewards_above": None, "max_steps": 1},
        critic=stages.above(None),
    )


def test_critic_gae_and_its_shuffled(compare, stages):
    compare(
        "critic",
        2,
        stages.cfg | {"controls": ["shuffled"], "max_steps": 1},
        critic=stages.above(None),
    )


def test_critic_td_with_strength_and_decay(compare, stages):
    """Good responses only, with an active clip."""
    runs = compare(
        "critic",
        2,
        stages.cfg
        | {
            "batch_size": 1,
            "weighting": CRITIC | {"advantage": "td", "strength": 0.6, "decay": 0.5},
            "policy_rewards_above": 0.0,
            "optimizer": SGD | {"lr": 5.0},
            "clip_grad_norm": 0.1,
            "max_steps": 3,
        },
        critic=stages.above(0.0),
    )
    assert runs["critic"].clipped == [True] * 3
