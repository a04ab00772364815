"""Critic-weighted fine-tuning of a multi-token-prediction model with FSDP2, on one rank or many.

On 8 GPUs:

    tune run --nproc_per_node 8 recipes/critic_wmtp_distributed.py --config configs/critic/7b.yaml

Four stages, each done once and then recognised by its fingerprint:

    rewards  one number per response: a reward model's, a column's, or verified labels
    critic   a value head on the frozen trunk learns which responses are good, and has to show it
    values   V after every token of the data set
    policy   the model is fine-tuned on all responses with weights from these values

The same file trains the controls. Copy it and edit it: nothing imports it.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1. V[t] is
the value after token t.
"""

import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torchtune import config, training, utils

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.check import Arguments, check_config
from wmtp_modules.config.file import merged
from wmtp_modules.config.keys import Critic, Rewards, TrainingKeys, ValueTable
from wmtp_modules.config.rules import CRITIC_RULES, TRAINING_RULES
from wmtp_modules.critic import folder, pairs, policy, values
from wmtp_modules.critic.figures import print_report
from wmtp_modules.critic.judge import Judge
from wmtp_modules.critic.page import page_caption, shown_rows, write_page
from wmtp_modules.critic.rewards import Responses, RewardTables, rated
from wmtp_modules.critic.states import RowStates
from wmtp_modules.data.loader import heldout_batches
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels
from wmtp_modules.loss.value_loss import judged_mask, pairs_loss, token_cross_entropy
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.models.head_groups import head_groups, scale_and_clip_
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import all_reduce_sum, rank_zero_first
from wmtp_modules.parallel.sharding import DTYPES
from wmtp_modules.progress import progress_bar
from wmtp_modules.registry.models import register_run
from wmtp_modules.reports.curves import plot_curves
from wmtp_modules.reports.run_page import draw_run
from wmtp_modules.run import controls, plan
from wmtp_modules.run.bad_steps import what_is_wrong
from wmtp_modules.run.figures import TrainingError, heldout_figures, noise_sums
from wmtp_modules.run.fit import fitted
from wmtp_modules.run.model import checked_model_args, frozen_model, make_model, make_optimizer
from wmtp_modules.run.resume import resolved
from wmtp_modules.run.run import Run
from wmtp_modules.run.start import exit_with_message, parse, process_group
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import ScoreTable, fingerprint_rows
from wmtp_modules.weighting.advantage import CriticWeighting

log = utils.get_logger("INFO")

PAGE_PAIRS = 4  # held-out pairs shown with their weights


class Config(TrainingKeys):
    """Every key of a config; what a component takes is read from its signature."""

    stages: list[str] = Field(description="some of rewards, critic, values, policy, in this order")
    rewards: Rewards | None = Field(None, description="a number for each response")
    critic: Critic | None = Field(None, description="the value head")
    value_table: ValueTable | None = Field(None, description="values of every token")
    allow_uninformative_critic: bool | None = Field(None, description="go on whatever it knows")
    policy_rewards_above: float | None = Field(
        None, description="standardised reward of what the policy sees; null: all responses"
    )
    weighting: Annotated[dict, Arguments(CriticWeighting, required=("name",))] = Field(
        description="what each token counts; its seed is the run's if left out"
    )


def check(cfg: DictConfig) -> None:
    """Find everything that can be wrong with a config before a process group or a model exists."""
    rules = (*TRAINING_RULES, *CRITIC_RULES, _stages_have_what_they_need)
    check_one = partial(check_config, keys=Config, rules=rules)
    controls.check_all(cfg, CriticWeighting.NAMES, check_one)


def _stages_have_what_they_need(
    stages: list, weighting: dict, rewards, critic, value_table, checkpointer
) -> str | list[str]:
    try:
        weighted = CriticWeighting(**weighting).needs_values
    except ValueError as error:
        return str(error)
    judged = weighted or {"critic", "values"} & set(stages)
    missing = [
        f"{key}: missing, the stages and the weighting need it"
        for key, block, needed in (
            ("rewards", rewards, judged or "rewards" in stages),
            ("critic", critic, judged),
            ("value_table", value_table, weighted or "values" in stages),
        )
        if needed and block is None
    ]
    trunk = ["checkpointer: null, but a critic needs a trained trunk"]
    return missing + (trunk if judged and checkpointer is None else [])


def needs_values(cfg: DictConfig) -> bool:
    """Whether this config or one of its controls weighs by values."""
    runs = controls.runs_of(cfg, CriticWeighting.NAMES)
    return any(make_weighting(run).needs_values for run in runs)


def needs_critic(cfg: DictConfig) -> bool:
    return needs_values(cfg) or bool({"critic", "values"} & set(cfg.stages))


def objective_and_head(cfg: DictConfig) -> tuple[str, str]:
    """Objective and kind of value head of a critic; a pairs critic adds evidence up."""
    objective = cfg.critic.get("objective") or "bce"
    return objective, cfg.critic.get("head") or {"bce": "turn", "pairs": "sum"}[objective]


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
        self._shown: dict = {}  # the policy's last micro-batch, for the page
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)

    # ------------------------------------------------- setup, with the rewards

    def setup(self) -> None:
        """Rows and rewards, which every stage and every policy of this config reads."""
        cfg = self._cfg
        training.set_seed(cfg.seed)
        self.model_args = checked_model_args(cfg)

        # Tokenised once by rank 0; the others then read the same cached file.
        self._tokenizer = config.instantiate(cfg.tokenizer)
        sets = {"train": cfg.dataset, "heldout": cfg.dataset_val}
        if cfg.get("critic") and cfg.critic.get("dataset"):
            sets["critic"] = cfg.critic.dataset
        with rank_zero_first():
            rows = {name: config.instantiate(one, self._tokenizer) for name, one in sets.items()}
        self._rows_made_from = self.watchdog.on_rank_zero(
            lambda: {name: fingerprint_rows(one) for name, one in rows.items()}
        )
        plain = {name: Responses(one) for name, one in rows.items()}
        found = self._rated(rows) if cfg.get("rewards") else plain
        self._train, self._heldout = found["train"], found["heldout"]
        self._taught = found.get("critic", self._train)  # what the critic learns from
        if needs_critic(cfg):
            objective, head = objective_and_head(cfg)
            self._critic_made_from = self.watchdog.on_rank_zero(
                lambda: folder.critic_fingerprint(
                    self._taught,
                    self._heldout,
                    rows_made_from=self._rows_made_from,
                    checkpoint_dir=cfg.checkpointer.checkpoint_dir,
                    tokenizer_path=cfg.tokenizer.path,
                    objective=objective,
                    head=head,
                    dtype=cfg.dtype,
                )
            )

    def _rated(self, rows: dict) -> dict[str, Responses]:
        """Each set's rewards and f(R), standardised by what the critic learns from."""
        cfg = self._cfg
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
        score, keys = "rewards" in cfg.stages, ("good", "threshold", "temperature")
        raw = {name: tables.of(one, name, score=score) for name, one in rows.items()}
        how: dict[str, Any] = {
            key: cfg.rewards[key] for key in keys if cfg.rewards.get(key) is not None
        }
        how.setdefault("good", "label" if cfg.rewards.source == "labels" else "above")
        both_kinds = "critic" in cfg.stages
        responses, self._reward_statistics = rated(rows, raw, both_kinds=both_kinds, **how)
        return responses

    # --------------------------------------------------------------- critic

    def train_critic(self) -> None:
        """Fit the value head on the frozen trunk, keep the best held-out one, judge it."""
        cfg, seed = self._cfg.critic, self._cfg.seed
        settings = folder.settings_of(resolved(self._cfg)["critic"]) | {"seed": seed}
        if folder.read_critic(self._critic_dir) is not None:
            folder.check_critic(self._critic_dir, self._critic_made_from, settings)
            self._critic()
            return
        objective, kind = objective_and_head(self._cfg)
        items = pairs.training_items(self._taught, objective=objective, seed=seed)
        data = self._taught, self._heldout, pairs.heldout_pairs(self._heldout, seed=seed)
        judge = Judge(self._trunk(), *data, objective=objective, watchdog=self.watchdog)
        torch.manual_seed(seed)  # equal heads on all ranks
        head = ValueHead(self.model_args["embed_dim"], kind).to(self.device)
        judge.prepare_(head, seed)
        # DDP averages gradients over ranks; the loss is summed first and divided once.
        replica = DistributedDataParallel(head)
        optimizer = config.instantiate(cfg.optimizer, head.parameters())
        joint_size = self._world * cfg.batch_size
        made_from = self._critic_made_from | settings | {"joint": joint_size}
        state = folder.TrainingState(self._critic_dir, made_from)
        state.resume(head, optimizer)
        shown, first = self._rank == 0, state.step
        bar = progress_bar(total=cfg.max_steps, initial=first, desc="critic", shown=shown)
        while state.step < cfg.max_steps and state.evaluations_since_best < cfg.patience:
            self.watchdog.beat(f"the critic's step {state.step + 1}")
            joint = pairs.joint_batch(len(items), joint_size, state.step, seed)
            own = items[joint[self._rank :: self._world]]
            loss, count = self._critic_loss(replica, judge.states, own)
            loss.backward()
            loss, count = all_reduce_sum(loss, count)
            if bad := what_is_wrong({"critic's loss": loss}, count):
                raise TrainingError(f"{bad} in step {state.step + 1}: lower critic.optimizer.lr")
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
        record["rewards"] = vars(self._reward_statistics)
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

    def _critic_loss(self, head, states: RowStates, items: np.ndarray) -> tuple:
        """Sum of the objective over this rank's rows or pairs, and how many it sums."""
        flat = items.T.flatten()  # pairs: first the better responses, then the worse ones
        batch, *both = states(flat)
        logits_BT = head(*both, batch["y"])
        if items.shape[1] == 2:
            return pairs_loss(logits_BT, batch["y"]), logits_BT.new_tensor(len(items))
        good_B = torch.from_numpy(self._taught.good[flat]).to(self.device)
        loss = token_cross_entropy(logits_BT, good_B, batch["y"])
        return loss, judged_mask(batch["y"]).sum()

    def _critic(self) -> dict:
        """The record of the critic, which is this run's and knows something."""
        return folder.useful_critic(
            self._critic_dir,
            self._critic_made_from,
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
        dataset, responses = self._rows_made_from["train"], self._train.rows
        return self.watchdog.on_rank_zero(
            lambda: values.values_fingerprint(
                self._critic_made_from, head_file, responses, dataset=dataset, max_seq_len=T
            )
        )

    def _write_page(self, head: ValueHead) -> None:
        """Some held-out responses with every token coloured by its weight; on rank 0."""
        cfg = merged(self._cfg, {"weighting": {"name": "critic"}})
        path, weighting = self._critic_dir / "weights.html", make_weighting(cfg)
        above, critic = cfg.get("policy_rewards_above"), self._values_made_from()["critic"]
        caption = page_caption(weighting, f"critic {critic[:12]}, policy_rewards_above {above}")
        if self.watchdog.on_rank_zero(lambda: path.exists() and caption in path.read_text("utf-8")):
            return
        _, scale = self._packs_and_scale(cfg, self._train.above(above))
        pairs_val = pairs.heldout_pairs(self._heldout, seed=cfg.seed).rows_P2
        shown = shown_rows(self._heldout, pairs_val, PAGE_PAIRS)
        rows = values.tokens_and_keep(self._heldout.rows.select(shown))
        if self._rank == 0:
            write_page(
                *(path, self._heldout, shown, values.row_values(self._trunk(), head, rows)),
                weighting=weighting,
                scale=scale,
                tokenizer=self._tokenizer,
                caption=caption,
            )

    # --------------------------------------------------------------- policy

    def _values(self) -> ScoreTable:
        """V after every token of the training set, of the critic at hand."""
        self._critic()
        table_dir = self._cfg.value_table.table_dir
        return ScoreTable.open(table_dir, self._values_made_from(), self._train.rows)

    def _packs_and_scale(self, cfg: DictConfig, chosen: np.ndarray) -> tuple[PackedDataset, dict]:
        """Packs of the rows that train, and the scale of their weights; a collective."""
        weighting, table, source = make_weighting(cfg), None, None
        if weighting.needs_values:
            table = self._values()
            source = cfg.value_table.table_dir, self._values_made_from()
        pack = {"max_seq_len": cfg.tokenizer.max_seq_len, "seed": cfg.seed}
        packs = policy.policy_packs(self._train, chosen, table=table, **pack)
        return packs, policy.weight_scale(
            *(packs, self._train, chosen, weighting),
            n_heads=self.model_args["n_future_tokens"],
            device=self.device,
            watchdog=self.watchdog,
            source=source,
        )

    def check_policies(self, runs: list[DictConfig]) -> None:
        """Raise now what a control would otherwise hide for hours."""
        for cfg in runs:
            policy.policy_rows(self._train, self._heldout, cfg.get("policy_rewards_above"))
            if make_weighting(cfg).needs_marks:
                policy.check_marks(self._train.rows)
        if any(make_weighting(cfg).needs_values for cfg in runs):
            self._values()

    def critic_summary(self) -> dict:
        """What the critic showed on held-out data."""
        report = self._critic()["report"]
        return {"critic": report | {"hopeless_problems": pairs.hopeless_problems(self._train)}}

    def made_from(self, cfg: DictConfig) -> str:
        """Hash of what a policy of this config is trained on: rows, rewards, critic and values."""
        parts: list[object] = list(self._rows_made_from.values())
        both = self._train, self._heldout
        parts += [[*map(float, x)] for one in both for x in (one.rewards, one.good)]
        if make_weighting(cfg).needs_values:
            parts.append(self._values_made_from())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def setup_policy(self, cfg: DictConfig) -> None:
        """The model to fine-tune and its rows; a control has another weighting and folder."""
        training.set_seed(cfg.seed)
        self._cfg, self._weighting = cfg, make_weighting(cfg)
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)
        above = cfg.get("policy_rewards_above")
        chosen, chosen_val = policy.policy_rows(self._train, self._heldout, above)
        utils.log_rank_zero(log, f"Policy: {len(chosen)} of {len(self._train.rows)} responses.")
        pack = {"max_seq_len": cfg.tokenizer.max_seq_len, "seed": cfg.seed}
        self._dataset_val = PackedDataset(self._heldout.rows.select(chosen_val), **pack)
        dataset, scale = self._packs_and_scale(cfg, chosen)
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
            draw=self.draw,
            kept={"scale": scale},
        )
        if not cfg.get("replay"):
            self._run.begin()

    def setup_model(self) -> None:
        """Model, optimizer and schedule; the memory estimator calls this as well."""
        cfg = self._cfg
        self._model = make_model(cfg, self._mesh, self.device)
        self._optimizer, self._lr_scheduler = make_optimizer(cfg, self._model)
        # Of parameters and the heads that train them: one, unless heads 1 to K - 1 train apart.
        self._groups = head_groups(self._model, self._weighting.decay)
        self._alphas_K = torch.stack([group.alphas_K for group in self._groups]).sum(0)

    def _loss_step(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """Weighted loss of one micro-batch, summed and not yet divided, with its figures."""
        K, run = self._model.n_future_tokens, self._run
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        inputs = {
            "mask": document_mask(batch["doc"]),
            "input_pos": batch["input_pos"],
            "distill": self._model.distill,
        }
        if self._weighting.needs_losses:
            trained_BTK, losses_BTK, distill_BTK = self._model(
                batch["tokens"], labels_BTK, **inputs
            )
            weights_BTK, stats = self._weighting(
                losses_BTK, mask_BTK, batch["doc"], None, step=run.micro_step
            )
            loss = (self._alphas_K * weights_BTK * trained_BTK).sum()
        else:  # weights known beforehand go into the forward, which saves a matrix product
            scale = run.kept["scale"]
            weights_BTK, stats = self._weighting(
                None,
                mask_BTK,
                batch["doc"],
                policy.log_raw_of(batch, self._weighting, scale),
                step=run.micro_step,
                scale_K=scale["scale_K"],
            )
            loss, losses_BTK, distill_BTK = self._model(
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
        if self._model.distill.weight:
            sums["distill_K"] = distill_BTK.sum((0, 1))
        self._shown = {"step": run.step + 1, "batch": batch, "mask_BTK": mask_BTK}
        self._shown["of_heads"] = {"weight": weights_BTK, "loss": losses_BTK.detach()}
        if "values" in batch:
            self._shown["of_tokens"] = {"value after it": batch["values"]}
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
            # Sum first, divide once: n' = sum of alpha_k n_k counts the targets of all ranks and
            # micro-batches, and heads that train apart have an n' and a norm of their own.
            norms = scale_and_clip_(self._groups, sums["n_K"], run.world, cfg.clip_grad_norm)
            lr = float(self._lr_scheduler.get_last_lr()[0])
            run.update(sums, norms)  # on all ranks or, where a figure is not finite, on none
            self._lr_scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
            run.end_step(sums, stats, norms, lr)
        run.finish_steps()

    def validate(self) -> tuple[list[float], dict]:
        """Unweighted loss of each head over the held-out set, and how fast it would decode."""
        batches = heldout_batches(
            self._dataset_val, self._cfg.batch_size, self._rank, self._world, self.device
        )
        return heldout_figures(self._model, self._run.beating(batches), self._tokenizer)

    def save_checkpoint(self, folder: Path) -> None:
        """The model in Meta's format, in the dtype that computed the losses."""
        path, dtype = self._cfg.tokenizer.path, DTYPES[self._cfg.dtype]
        save_meta(self._model, folder, tokenizer_path=path, dtype=dtype)

    def finish(self, beside: dict[str, Path]) -> dict:
        """Draw the curves, also of the runs beside it, close everything, return the figures."""
        summary = self._run.summary() | {"made_from": self.made_from(self._cfg)}
        if shares := self._run.noise_shares():
            summary["weight_on_spoiled"] = {"data": shares[0], self._cfg.weighting.name: shares[1]}
        curves = Path(self._cfg.output_dir) / "curves.png"
        if self._rank == 0:
            own = {controls.name_of(self._cfg): curves.with_name("metrics.jsonl")}
            plot_curves(beside | own, curves)
            self.draw(summary)
        names = ("critic.json", "calibration.png", "weights.html")
        pictures = curves, curves.with_name("run.html")
        self._run.close(*pictures, *(self._critic_dir / name for name in names))
        return summary

    def draw(self, summary: dict | None = None) -> None:
        """The page of the policy's run as far as it has come; rank 0 calls it."""
        draw_run(self._cfg.output_dir, summary, self._tokenizer, self._shown)

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
        cfg = fitted(cfg, __file__, recipe.device)
        recipe.setup_policy(cfg)
    return plan.train(recipe, cfg, stops, beside, started)


def report(cfg: DictConfig, summary: dict) -> None:
    """Print the figures and where everything is."""
    if "critic" in summary:
        print_report(summary["critic"])
        where = cfg.critic.checkpoint_dir
        print(f"  pictures {where}/calibration.png and {where}/weights.html")
    if "heldout_loss" in summary:
        plan.print_losses(summary)
        if share := summary.get("weight_on_spoiled"):
            data, weight = share.values()
            print(f"Spoiled: {data:.1%} of the training targets, {weight:.1%} of their weight")
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
    if runs:
        with exit_with_message(ValueError, OSError):
            recipe.check_policies(runs)
            summary |= recipe.critic_summary() if needs_values(cfg) else {}
        of_policies = plan.run_all(runs, lambda one, beside: train_one(recipe, one, stops, beside))
        summary = of_policies | summary
    summary["seconds"] = round(time.perf_counter() - started, 1)
    if dist.get_rank() != 0:
        return
    report(cfg, summary)
    if runs:
        plan.write_summary(output_dir, summary)
        if model_name := (cfg.get("registry") or {}).get("model_name"):
            register_run(output_dir, model_name)
    elif (output_dir / "summary.json").exists():  # a policy's figures stay
        before = json.loads((output_dir / "summary.json").read_text())
        plan.write_summary(output_dir, before | summary)


if __name__ == "__main__":
    sys.exit(recipe_main())
