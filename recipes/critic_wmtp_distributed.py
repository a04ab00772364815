"""Critic-weighted fine-tuning of a multi-token-prediction model with FSDP2, on one rank or many.

    tune run --nproc_per_node 8 recipes/critic_wmtp_distributed.py --config configs/critic/7b.yaml

Four stages, each done once and then recognised by its fingerprint:

    rewards  one number per response: a reward model's, a column's, or verified labels
    critic   a value head on the frozen trunk learns which responses are good, and has to show it
    values   V after every token of the data set
    policy   the model is fine-tuned with weights from generalised advantages
             (Schulman et al. 2016, arXiv 1506.02438)

The same file trains the controls. Copy it and edit it: nothing imports it.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1. V[t] is
the value after token t, so the value before token u is V[u - 1].
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torchtune import config, training, utils
from torchtune.modules.attention_utils import packed_block_causal_mask

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.check import AtLeast, ConfigError, Optional, check_config
from wmtp_modules.config.file import merged
from wmtp_modules.config.keys import OPTIMIZER, TRAINING_KEYS
from wmtp_modules.config.rules import CRITIC_RULES, TRAINING_RULES
from wmtp_modules.critic import folder, pairs, values
from wmtp_modules.critic.figures import print_report
from wmtp_modules.critic.judge import Judge
from wmtp_modules.critic.page import page_caption, write_pairs_page
from wmtp_modules.critic.rewards import Responses, RewardStatistics, RewardTables
from wmtp_modules.data.loader import heldout_batches
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, head_alphas, mtp_labels
from wmtp_modules.loss.value_loss import pairwise_loss, regression_loss, row_means
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import all_reduce_sum, rank_zero_first
from wmtp_modules.parallel.sharding import DTYPES
from wmtp_modules.progress import progress_bar
from wmtp_modules.reports.curves import plot_curves
from wmtp_modules.run import controls, plan
from wmtp_modules.run.bad_steps import what_is_wrong
from wmtp_modules.run.figures import TrainingError, heldout_losses, noise_sums
from wmtp_modules.run.model import checked_model_args, frozen_model, make_model, make_optimizer
from wmtp_modules.run.resume import resolved
from wmtp_modules.run.run import Run
from wmtp_modules.run.start import exit_with_message, parse, process_group
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import fingerprint_rows
from wmtp_modules.weighting.advantage import CriticWeighting, standardise

log = utils.get_logger("INFO")

PAGE_PAIRS = 4  # held-out pairs shown with their weights

# Every key of a config; what a component takes is read from its signature.
SCHEMA = TRAINING_KEYS | {
    "stages": list[str],
    "rewards": Optional(
        {
            "source": ("reward_model", "column", "labels"),
            "checkpointer": Optional({"checkpoint_dir": str}),  # of a reward model
            "table_dir": str,
            "batch_tokens": AtLeast(int, 1),
        }
    ),
    "critic": Optional(
        {
            "objective": ("regression", "pairwise"),
            "checkpoint_dir": str,
            "optimizer": OPTIMIZER,
            "batch_size": AtLeast(int, 1),  # rows, or pairs of rows, of a rank
            "max_steps": AtLeast(int, 1),
            "eval_every_n_steps": AtLeast(int, 1),
            "patience": AtLeast(int, 1),  # evaluations without a better held-out loss
        }
    ),
    "value_table": Optional({"table_dir": str, "batch_tokens": AtLeast(int, 1)}),
    "allow_uninformative_critic": Optional(bool),
    "policy_rewards_above": Optional(float),  # standardised, 0 if left out; null: all responses
    "weighting": CriticWeighting,
}


def check(cfg: DictConfig) -> None:
    """Find everything that can be wrong with a config before a process group or a model exists."""
    check_config(cfg, SCHEMA, (*TRAINING_RULES, *CRITIC_RULES))
    if "name" not in cfg.weighting:
        raise ConfigError("weighting.name: missing")
    alone = merged(cfg, {"controls": None})  # each control is checked by itself, below
    weighted, critic = needs_values(alone), needs_critic(alone)
    for block, needed in (
        ("rewards", critic or "rewards" in cfg.stages),
        ("critic", critic),
        ("value_table", weighted or "values" in cfg.stages),
    ):
        if needed and cfg.get(block) is None:
            raise ConfigError(f"{block}: missing, the stages and the weighting need it")
    if critic and cfg.checkpointer is None:
        raise ConfigError("checkpointer: null, but a critic needs a trained trunk")
    controls.check_controls(cfg, CriticWeighting.NAMES, check)


def needs_values(cfg: DictConfig) -> bool:
    """Whether this config or one of its controls weighs by values."""
    runs = controls.runs_of(cfg, CriticWeighting.NAMES)
    return any(make_weighting(run).needs_scores for run in runs)


def needs_critic(cfg: DictConfig) -> bool:
    return needs_values(cfg) or bool({"critic", "values"} & set(cfg.stages))


def make_weighting(cfg: DictConfig) -> CriticWeighting:
    return CriticWeighting(**{"seed": cfg.seed, **cfg.weighting})


class CriticWMTPRecipeDistributed:
    """The stages of one config, its controls included. ``recipe_main`` calls them in order."""

    def __init__(
        self, cfg: DictConfig, device: torch.device, mesh: DeviceMesh, stops: StopRequests
    ) -> None:
        self._cfg = cfg
        self.device = device
        self._mesh = mesh
        self._stops = stops
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._weighting = make_weighting(cfg)
        self._critic_dir = Path(cfg.critic.checkpoint_dir if cfg.get("critic") else "none")
        self._frozen: MTPTransformer | None = None  # the critic's trunk, while it is needed
        self._statistics: tuple[float, float] | None = None  # of the advantages
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)

    # ------------------------------------------------- setup, with the rewards

    def setup(self) -> None:
        """Rows and rewards, which every stage and every policy of this config reads."""
        cfg = self._cfg
        training.set_seed(cfg.seed)
        self.model_args = checked_model_args(cfg)

        # Tokenised once by rank 0; the others then read the same cached file.
        self._tokenizer = config.instantiate(cfg.tokenizer)
        with rank_zero_first():
            rows = config.instantiate(cfg.dataset, self._tokenizer)
            rows_val = config.instantiate(cfg.dataset_val, self._tokenizer)
        self._train, self._heldout = Responses(rows), Responses(rows_val)
        both = rows, rows_val
        self._rows_made_from = self.watchdog.on_rank_zero(lambda: [*map(fingerprint_rows, both)])
        if cfg.get("rewards"):
            self._setup_rewards()
        if needs_critic(cfg):
            self._critic_made_from = self.watchdog.on_rank_zero(
                lambda: folder.critic_fingerprint(
                    self._train,
                    self._heldout,
                    rows_made_from=self._rows_made_from,
                    checkpoint_dir=cfg.checkpointer.checkpoint_dir,
                    tokenizer_path=cfg.tokenizer.path,
                    objective=cfg.critic.objective,
                    dtype=cfg.dtype,
                )
            )

    def _setup_rewards(self) -> None:
        """Rewards of both data sets, standardised with the statistics of the training set."""
        cfg, train, heldout = self._cfg, self._train.rows, self._heldout.rows
        tables = RewardTables(
            cfg.rewards.source,
            table_dir=cfg.rewards.table_dir,
            tokenizer_path=cfg.tokenizer.path,
            max_seq_len=cfg.tokenizer.max_seq_len,
            batch_tokens=cfg.rewards.batch_tokens,
            checkpoint_dir=(cfg.rewards.get("checkpointer") or {}).get("checkpoint_dir"),
            dtype=cfg.dtype,
            device=self.device,
            watchdog=self.watchdog,
        )
        score = "rewards" in cfg.stages
        raw = tables.of(train, "train", score=score)
        raw_val = tables.of(heldout, "heldout", score=score)
        self._reward_statistics = RewardStatistics.of(raw)
        self._train = Responses(train, self._reward_statistics.standardise(raw))
        self._heldout = Responses(heldout, self._reward_statistics.standardise(raw_val))
        if "critic" in cfg.stages and np.ptp(raw_val) == 0:
            raise ValueError(
                f"dataset_val: every response has reward {raw_val[0]}: a critic is judged on good "
                "and bad responses"
            )

    # --------------------------------------------------------------- critic

    def train_critic(self) -> None:
        """Fit the value head on the frozen trunk, keep the best held-out one, judge it."""
        cfg, seed = self._cfg.critic, self._cfg.seed
        # How it is trained is of no matter to a policy, but another way makes another critic.
        settings = {k: v for k, v in resolved(self._cfg)["critic"].items() if k != "checkpoint_dir"}
        settings |= {"seed": seed}
        if folder.read_critic(self._critic_dir) is not None:
            folder.check_critic(self._critic_dir, self._critic_made_from, settings)
            self._critic()
            return
        items, pairs_val = self._critic_items()
        data = self._train, self._heldout, pairs_val
        judge = Judge(self._trunk(), *data, objective=cfg.objective, watchdog=self.watchdog)
        torch.manual_seed(seed)  # equal heads on all ranks
        head = ValueHead(self.model_args["embed_dim"]).to(self.device)
        # DDP averages gradients over ranks; the loss is summed first and divided once.
        replica = DistributedDataParallel(head)
        optimizer = config.instantiate(cfg.optimizer, head.parameters())
        joint_size = self._world * cfg.batch_size
        made_from = self._critic_made_from | settings | {"joint": joint_size}
        state = folder.TrainingState(self._critic_dir, made_from)
        state.resume(head, optimizer)
        bar = progress_bar(
            total=cfg.max_steps, initial=state.step, desc="critic", shown=self._rank == 0
        )
        while state.step < cfg.max_steps and state.evaluations_since_best < cfg.patience:
            self.watchdog.beat(f"the critic's step {state.step + 1}")
            joint = pairs.joint_batch(len(items), joint_size, state.step, seed)
            loss, count = self._critic_loss(replica, items[joint[self._rank :: self._world]])
            loss.backward()
            loss, count = all_reduce_sum(loss, count)
            if problem := what_is_wrong({"critic's loss": loss}, count):
                raise TrainingError(
                    f"{problem} in step {state.step + 1}: lower critic.optimizer.lr"
                )
            training.scale_grads(head, self._world / count)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            bar.update()
            if state.step % cfg.eval_every_n_steps == 0 or state.step == cfg.max_steps:
                heldout = state.evaluated(judge.heldout_loss(head), head, optimizer)
                bar.set_postfix_str(f"loss {float(loss / count):.4f} held-out {heldout:.4f}")
        bar.close()
        record = {"fingerprint": self._critic_made_from, "settings": settings}
        record |= {"rewards": vars(self._reward_statistics)}
        judge.finish(head, state, self._critic_dir, record, seed)
        self._critic()

    def _trunk(self) -> MTPTransformer:
        """The frozen model, loaded when it is first needed."""
        if self._frozen is None:
            with self.watchdog.paused():
                self._frozen = frozen_model(self._cfg, self.device)
        return self._frozen

    def free_trunk(self) -> None:
        """Leave the memory to the policy."""
        self._frozen = None
        torch.cuda.empty_cache()  # does nothing on a CPU

    def _critic_items(self) -> tuple[np.ndarray, np.ndarray]:
        """What to train on, [n, 1] rows or [n, 2] pairs, and held-out pairs."""
        objective, seed = self._cfg.critic.objective, self._cfg.seed
        return pairs.training_items(self._train, self._heldout, objective=objective, seed=seed)

    def _critic_loss(self, head, items: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and count of the objective over this rank's rows or pairs."""
        flat = items.T.flatten()  # pairs: first the better responses, then the worse ones
        batch = values.batch_of(self._train.rows, flat.tolist(), self.device)
        with torch.no_grad():
            hidden_BTD = self._trunk().trunk(batch["tokens"])
        values_BT = head(hidden_BTD)
        if self._cfg.critic.objective == "pairwise":
            better_P, worse_P = row_means(values_BT, batch["y"]).chunk(2)
            return pairwise_loss(better_P, worse_P), values_BT.new_tensor(len(better_P))
        rewards_B = torch.from_numpy(self._train.rewards[flat]).to(values_BT)
        rewards_BT = rewards_B[:, None].expand_as(values_BT)
        return regression_loss(values_BT, rewards_BT, batch["y"]), batch["y"].sum()

    def _critic(self) -> dict:
        """The record of the critic, which is this run's and knows something."""
        return folder.useful_critic(
            self._critic_dir,
            self._critic_made_from,
            objective=self._cfg.critic.objective,
            allow_any=bool(self._cfg.get("allow_uninformative_critic")),
        )

    # --------------------------------------------------------------- values

    def compute_values(self) -> None:
        """V after every token of the training set, from the frozen trunk and the critic."""
        self._critic()
        width = self.model_args["embed_dim"]
        head = folder.load_value_head(self._critic_dir, width).to(self.device)
        values.compute_values(
            self._trunk,
            head,
            self._train.rows,
            table_dir=self._cfg.value_table.table_dir,
            fingerprint=self._values_made_from(),
            batch_tokens=self._cfg.value_table.batch_tokens,
            watchdog=self.watchdog,
        )
        self._write_page(head)

    def _values_made_from(self) -> dict:
        head_file, T = self._critic_dir / folder.HEAD_FILE, self._cfg.tokenizer.max_seq_len
        made_from = self._critic_made_from
        return self.watchdog.on_rank_zero(
            lambda: values.values_fingerprint(made_from, head_file, max_seq_len=T)
        )

    def _write_page(self, head: ValueHead) -> None:
        """A few held-out pairs with every token coloured by its weight; on rank 0."""
        path, critic = self._critic_dir / "weights.html", self._values_made_from()["critic"]
        above = self._cfg.get("policy_rewards_above", 0.0)
        of = f"critic {critic[:12]}, policy_rewards_above {above}"
        caption, (_, pairs_val) = page_caption(self._weighting, of), self._critic_items()
        is_there = path.exists() and caption in path.read_text("utf-8")
        if self.watchdog.on_rank_zero(lambda: is_there) or not len(pairs_val):
            return
        chosen, _ = self._policy_rows()
        statistics = self._advantage_statistics(self._valued_packs(chosen), chosen)
        if self._rank == 0:
            write_pairs_page(
                path,
                self._trunk(),
                head,
                self._heldout.rows,
                pairs_val[:PAGE_PAIRS],
                self._heldout.rewards,
                weighting=self._weighting,
                statistics=statistics,
                tokenizer=self._tokenizer,
                caption=caption,
            )

    # --------------------------------------------------------------- policy

    def _policy_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that train the policy, and the held-out ones of their kind."""
        above = self._cfg.get("policy_rewards_above", 0.0)  # only good ones, unless asked
        chosen, chosen_val = self._train.above(above), self._heldout.above(above)
        if not len(chosen) or not len(chosen_val):
            raise ValueError(
                f"policy_rewards_above {above} leaves {len(chosen)} training and "
                f"{len(chosen_val)} held-out responses: lower it (rewards are standardised)"
            )
        return chosen, chosen_val

    def _valued_packs(self, chosen: np.ndarray) -> PackedDataset:
        """The policy's packs, with values and rewards beside the tokens."""
        self._critic()
        return values.valued_packs(
            self._train,
            chosen,
            table_dir=self._cfg.value_table.table_dir,
            fingerprint=self._values_made_from(),
            max_seq_len=self._cfg.tokenizer.max_seq_len,
            seed=self._cfg.seed,
        )

    def _advantage_statistics(self, packs: PackedDataset, chosen: np.ndarray) -> tuple:
        """Mean and deviation of the advantages, the same for all policies of a config."""
        if self._statistics is None:
            lam = self._weighting.lam
            self._statistics = values.advantage_statistics(packs, chosen, lam, self.device)
        return self._statistics

    def check_policy(self) -> dict:
        """What the critic showed; an error now is one that a control would hide for hours."""
        self._valued_packs(self._policy_rows()[0])
        return self.critic_summary()

    def critic_summary(self) -> dict:
        """What the critic showed on held-out data."""
        report = self._critic()["report"]
        near = report.pop("delta_near_mutation", None)
        return {"critic": report} | ({"delta_near_mutation": near} if near else {})

    def made_from(self, cfg: DictConfig) -> str:
        """Hash of what a policy of this config is trained on: rows, rewards, critic and values."""
        parts: list[object] = list(self._rows_made_from)
        if cfg.get("rewards"):
            parts += [[*map(float, one.rewards)] for one in (self._train, self._heldout)]
        if make_weighting(cfg).needs_scores:
            parts.append(self._values_made_from())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def setup_policy(self, cfg: DictConfig) -> None:
        """The model to fine-tune and its rows; a control has another weighting and folder."""
        training.set_seed(cfg.seed)
        self._cfg, self._weighting = cfg, make_weighting(cfg)
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)
        chosen, chosen_val = self._policy_rows()
        utils.log_rank_zero(log, f"Policy: {len(chosen)} of {len(self._train.rows)} responses.")
        pack = {"max_seq_len": cfg.tokenizer.max_seq_len, "seed": cfg.seed}
        self._dataset_val = PackedDataset(self._heldout.rows.select(chosen_val), **pack)
        statistics = None
        if self._weighting.needs_scores:
            dataset = self._valued_packs(chosen)
            statistics = self._advantage_statistics(dataset, chosen)
        else:
            dataset = PackedDataset(self._train.rows.select(chosen), **pack)
        self.setup_model()
        self._run = Run(
            cfg,
            device=self.device,
            stops=self._stops,
            watchdog=self.watchdog,
            model=self._model,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            dataset=dataset,
            alphas_K=self._alphas_K,
            made_from=self.made_from(cfg),
            validate=self.validate,
            export=self.save_checkpoint,
            kept={"statistics": statistics},
        )
        if not cfg.get("replay"):
            self._run.begin()

    def setup_model(self) -> None:
        """Model, optimizer and schedule; the memory estimator calls this as well."""
        cfg = self._cfg
        self._model = make_model(cfg, self._mesh, self.device)
        self._optimizer, self._lr_scheduler = make_optimizer(cfg, self._model)
        alphas_K = head_alphas(self._model.n_future_tokens, self._weighting.decay)
        self._alphas_K = alphas_K.to(self.device)

    def _loss_step(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """Weighted loss of one micro-batch, summed and not yet divided, with its figures."""
        K, run = self._model.n_future_tokens, self._run
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        inputs = {
            "mask": packed_block_causal_mask(batch["seq_lens"]),
            "input_pos": batch["input_pos"],
        }
        if self._weighting.needs_losses:
            losses_BTK = self._model(batch["tokens"], labels_BTK, **inputs)
            weights_BTK, stats = self._weighting(
                losses_BTK, mask_BTK, batch["doc"], None, step=run.micro_step
            )
            loss = (self._alphas_K * weights_BTK * losses_BTK).sum()
        else:  # weights known beforehand go into the forward, which saves a matrix product
            z_BT = None
            if self._weighting.needs_scores:
                a_BT = values.batch_advantages(batch, self._weighting.lam)
                z_BT = standardise(a_BT, *run.kept["statistics"])
            weights_BTK, stats = self._weighting(
                None, mask_BTK, batch["doc"], z_BT, step=run.micro_step
            )
            loss, losses_BTK = self._model(
                batch["tokens"],
                labels_BTK,
                token_weights_BTK=self._alphas_K * weights_BTK,
                **inputs,
            )
        sums = {
            "n_K": mask_BTK.sum((0, 1)),
            "loss_K": losses_BTK.detach().sum((0, 1)),
            "objective": loss.detach(),
            "tokens": (batch["doc"] >= 0).sum(),
            "noise": noise_sums(batch["noise"], mask_BTK, weights_BTK),
        }
        return loss, sums, stats

    def train(self) -> None:
        cfg, run = self._cfg, self._run
        run.start_steps()
        while run.step < cfg.max_steps:
            sums, stats = run.new_sums(), {}
            for batch in run.micro_batches():
                loss, micro_sums, stats = self._loss_step(batch)
                loss.backward()
                sums += micro_sums
            sums = sums.all_reduced()
            # Sum first, divide once: n' counts the targets of all ranks and micro-batches.
            # FSDP2 averages gradients over ranks, hence the factor world.
            n_prime = (self._alphas_K * sums["n_K"]).sum().clamp(min=1e-6)
            training.scale_grads(self._model, run.world / n_prime)
            grad_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), cfg.clip_grad_norm)
            lr = float(self._lr_scheduler.get_last_lr()[0])
            if run.may_update(sums, grad_norm):
                self._optimizer.step()
            self._lr_scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
            run.end_step(sums, stats, grad_norm, lr)
        run.finish_steps()

    def validate(self) -> list[float]:
        """Unweighted loss of each head over the whole held-out set, equal on all ranks."""
        batches = heldout_batches(
            self._dataset_val, self._cfg.batch_size, self._rank, self._world, self.device
        )
        return heldout_losses(self._model, self._run.beating(batches))

    def save_checkpoint(self, folder: Path) -> None:
        """The model in Meta's format, in the dtype that computed the losses."""
        tokenizer, dtype = self._cfg.tokenizer.path, DTYPES[self._cfg.dtype]
        save_meta(self._model, folder, tokenizer_path=tokenizer, dtype=dtype)

    def finish(self, beside: dict[str, Path]) -> dict:
        """Draw the curves, also of the runs beside it, close everything, return the figures."""
        summary = self._run.summary() | {"made_from": self.made_from(self._cfg)}
        curves = Path(self._cfg.output_dir) / "curves.png"
        if self._rank == 0:
            own = {controls.name_of(self._cfg): curves.with_name("metrics.jsonl")}
            plot_curves(beside | own, curves)
        names = ("critic.json", "calibration.png", "weights.html")
        self._run.close(curves, *(self._critic_dir / name for name in names))
        return summary

    def replay(self) -> None:
        """Repeat the step at which a run stopped, and train nothing."""
        self._run.replay(self._loss_step)


# ------------------------------------------------------------------ the runs of a config


def make_stages(recipe: CriticWMTPRecipeDistributed, stages: list[str]) -> dict:
    """Everything that comes before the policy; a stage whose result is there is skipped."""
    with exit_with_message(ValueError, OSError, TrainingError):
        recipe.setup()
        if "critic" in stages:
            with plan.in_turn(recipe._critic_dir), recipe.watchdog:
                recipe.train_critic()
        if "values" in stages:
            recipe.compute_values()
        recipe.free_trunk()
        return recipe.critic_summary() if {"critic", "values"} & set(stages) else {}


def train_one(recipe, cfg: DictConfig, stops: StopRequests, beside: dict[str, Path]) -> dict:
    """The summary of one policy run, which is made unless it is complete already."""
    name, started = controls.name_of(cfg), time.perf_counter()
    with exit_with_message(ValueError, OSError):
        summary = plan.finished(cfg) if cfg.resume_from_checkpoint else None
        if summary and summary.get("made_from") == recipe.made_from(cfg):
            return summary
        utils.log_rank_zero(log, f"{name}: {cfg.max_steps} steps, output in {cfg.output_dir}")
        recipe.setup_policy(cfg)
    return plan.train(recipe, cfg, stops, beside, started)


def report(cfg: DictConfig, summary: dict) -> None:
    """Print the figures and where everything is."""
    if "critic" in summary:
        print_report(summary["critic"], summary.get("delta_near_mutation"))
        where = Path(cfg.critic.checkpoint_dir)
        print(f"  pictures {where / 'calibration.png'} and {where / 'weights.html'}")
    if "heldout_loss" in summary:
        plan.print_losses(summary)
        plan.print_places(Path(cfg.output_dir), summary)


@parse
def recipe_main(cfg: DictConfig) -> None:
    with exit_with_message(ValueError, OSError):
        check(cfg)
        required = plan.required_runs(cfg, check)
    with process_group(cfg) as (device, mesh, stops):
        if cfg.get("replay"):
            cfg = merged(cfg, {"compile": False})  # compiled blocks have no hooks
            with exit_with_message(ValueError, OSError):
                recipe = CriticWMTPRecipeDistributed(cfg, device, mesh, stops)
                recipe.setup()
                recipe.setup_policy(cfg)
                recipe.replay()
            return
        # What the stages make stays where it is, also where ${output_dir} is a control's.
        made = {name: resolved(cfg).get(name) for name in ("rewards", "critic", "value_table")}
        policy_cfg = merged(cfg, made, {"stages": ["policy"]})
        runs = controls.runs_of(policy_cfg, CriticWeighting.NAMES) if "policy" in cfg.stages else []
        plan.prepare(cfg, runs)
        for one in required:
            with plan.in_turn(one.output_dir):
                recipe = CriticWMTPRecipeDistributed(one, device, mesh, stops)
                make_stages(recipe, [])
                train_one(recipe, one, stops, {})
        make_runs(cfg, runs, CriticWMTPRecipeDistributed(cfg, device, mesh, stops), stops)


def make_runs(cfg: DictConfig, runs: list[DictConfig], recipe, stops: StopRequests) -> None:
    """The stages before the policy, then the policy's runs and their figures side by side."""
    started, output_dir = time.perf_counter(), Path(cfg.output_dir)
    summary = make_stages(recipe, cfg.stages)
    if runs and needs_values(cfg):
        with exit_with_message(ValueError, OSError):
            summary |= recipe.check_policy()
    if runs:
        policy = plan.run_all(runs, lambda one, beside: train_one(recipe, one, stops, beside))
        summary = policy | summary
    summary["seconds"] = round(time.perf_counter() - started, 1)
    if dist.get_rank() != 0:
        return
    report(cfg, summary)
    if runs:
        plan.write_summary(output_dir, summary)
    elif (output_dir / "summary.json").exists():  # a policy's figures stay
        before = json.loads((output_dir / "summary.json").read_text())
        plan.write_summary(output_dir, before | summary)


if __name__ == "__main__":
    sys.exit(recipe_main())
