"""Rho-1 weighted fine-tuning of a multi-token-prediction model with FSDP2, on one rank or many.

On 8 GPUs:

    tune run --nproc_per_node 8 recipes/rho1_wmtp_distributed.py --config configs/rho1/7b.yaml

Rho-1 (Lin et al. 2024, arXiv 2404.07965) trains on the tokens whose loss exceeds that of a
reference model trained on clean data. Here each head k of an MTP model (arXiv 2404.19737) ranks
its own tokens, against the same head of the reference. The same file trains the reference (uniform
weights) and the controls. Copy it and edit it: nothing imports it.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from datasets import Dataset
from omegaconf import DictConfig
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh
from torchtune import config, training, utils

from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.check import Arguments, check_config
from wmtp_modules.config.file import merged
from wmtp_modules.config.keys import Reference, TrainingKeys
from wmtp_modules.config.rules import TRAINING_RULES
from wmtp_modules.data.loader import heldout_batches
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.data.rows import check_weights_of
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.models.head_groups import head_groups, scale_and_clip_
from wmtp_modules.parallel.process_group import rank_zero_first, share_from_rank_zero
from wmtp_modules.parallel.sharding import DTYPES
from wmtp_modules.registry.models import register_run
from wmtp_modules.reports.curves import plot_curves
from wmtp_modules.reports.run_page import draw_run
from wmtp_modules.run import controls, plan
from wmtp_modules.run.figures import heldout_figures, heldout_losses, noise_sums
from wmtp_modules.run.fit import fitted
from wmtp_modules.run.model import checked_model_args, make_model, make_optimizer
from wmtp_modules.run.run import Run
from wmtp_modules.run.start import exit_with_message, parse, process_group
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring import reference as references
from wmtp_modules.scoring.score_table import fingerprint_rows
from wmtp_modules.weighting.token_weighting import TokenWeighting

log = utils.get_logger("INFO")


class Config(TrainingKeys):
    """Every key of a config; what a component takes is read from its signature."""

    weighting: Annotated[dict, Arguments(TokenWeighting, required=("name",))] = Field(
        description="what each token counts; its seed is the run's if left out"
    )
    reference: Reference | None = Field(None, description="the model that rho1 compares with")


def check(cfg: DictConfig) -> None:
    """Find everything that can be wrong with a config before a process group or a model exists."""
    rules = (*TRAINING_RULES, _weighting_has_its_scores)
    check_one = partial(check_config, keys=Config, rules=rules)
    controls.check_all(cfg, TokenWeighting.NAMES, check_one, _tables_are_apart)


def _tables_are_apart(runs: list[DictConfig]) -> list[str]:
    """Two runs may share a table only if it is of one reference and the same rows."""
    wrong, tables = [], {}
    for one in runs:
        if not make_weighting(one).needs_scores or one.reference.mode == "online":
            continue
        table_dir = one.reference.table_dir
        made_from = one.reference.checkpointer.checkpoint_dir, one.dataset
        if tables.setdefault(table_dir, made_from) != made_from:
            wrong.append(
                f"controls.{controls.name_of(one)}.reference.table_dir: {table_dir} is another "
                "run's as well, with another reference or other rows: give this control its own"
            )
    return wrong


def _weighting_has_its_scores(weighting: dict, reference: dict | None) -> str | None:
    try:
        needs_scores = TokenWeighting(**weighting).needs_scores
    except ValueError as error:
        return str(error)
    if needs_scores and not reference:
        return f"reference: missing, the weighting {weighting['name']!r} needs it"


def make_weighting(cfg: DictConfig) -> TokenWeighting:
    return TokenWeighting(**{"seed": cfg.seed, **cfg.weighting})


def load_rows(cfg: DictConfig) -> tuple[Dataset, Dataset]:
    """Rows to train on and held-out ones, of which the weighting can have what it needs."""
    # Tokenised once by rank 0; the others then read the same cached file.
    tokenizer = config.instantiate(cfg.tokenizer)
    with rank_zero_first():
        rows = config.instantiate(cfg.dataset, tokenizer)
        rows_val = config.instantiate(cfg.dataset_val, tokenizer)
    weighting = make_weighting(cfg)
    needs = {"noise": weighting.needs_marks, "weight": weighting.needs_weights}
    check_weights_of(rows, weighting.name, [field for field in needs if needs[field]])
    return rows, rows_val


class Rho1WMTPRecipeDistributed:
    """One training run. ``recipe_main`` below makes the runs of a config, controls included."""

    def __init__(
        self, cfg: DictConfig, device: torch.device, mesh: DeviceMesh, stops: StopRequests
    ) -> None:
        self._cfg = cfg
        self.device = device
        self._mesh = mesh
        self._stops = stops
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._dtype = DTYPES[cfg.dtype]
        self._weighting = make_weighting(cfg)
        self._reference_model = None  # unless it scores
        self._reference: tuple[int, list[float]] | None = None  # its heads, held-out losses
        self._beside_model: dict = {}  # these and the model's
        self._shown: dict = {}  # the last micro-batch, for the page
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)

    # ---------------------------------------------------------------- setup

    def setup(self) -> None:
        cfg = self._cfg
        training.set_seed(cfg.seed)
        self.model_args = checked_model_args(cfg)

        self._tokenizer = config.instantiate(cfg.tokenizer)
        rows, rows_val = load_rows(cfg)
        pack = {"max_seq_len": cfg.tokenizer.max_seq_len, "seed": cfg.seed}
        self._dataset_val = PackedDataset(rows_val, **pack)

        # Reference losses come first, so that the scorer is gone before training needs memory.
        table = self._score(rows) if self._weighting.needs_scores else None
        dataset = PackedDataset(rows, scores={"reference": table} if table else None, **pack)
        made_from = [fingerprint_rows(r) for r in (rows, rows_val)] if self._rank == 0 else None

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
            made_from=share_from_rank_zero(made_from),
            validate=self.validate,
            export=self.save_checkpoint,
            draw=self.draw,
        )
        if not cfg.get("replay"):
            self._run.begin()

    def _score(self, rows) -> references.ScoreTable | None:
        """Reference losses of every training row, scored once and kept; None if scored online."""
        cfg, K = self._cfg, self.model_args["n_future_tokens"]
        self._reference_model = model = references.load_reference(
            cfg.reference.checkpointer.checkpoint_dir,
            tokenizer_path=cfg.tokenizer.path,
            max_seq_len=cfg.tokenizer.max_seq_len,
            n_future_tokens=K,
            dtype=self._dtype,
            device=self.device,
        )
        losses_of = partial(references.packed_losses, n_future_tokens=K)
        with self.watchdog:
            batches = self.watchdog.beating(self._heldout_batches(), "the reference's validation")
            losses_K = heldout_losses(model, batches, losses_of, "the reference for the heads")
        self._reference = (model.n_future_tokens, losses_K)
        if cfg.reference.mode == "online":
            return None
        with self.watchdog:
            table = references.reference_table(
                model,
                rows,
                checkpoint_dir=cfg.reference.checkpointer.checkpoint_dir,
                table_dir=cfg.reference.table_dir,
                tokenizer_path=cfg.tokenizer.path,
                max_seq_len=cfg.tokenizer.max_seq_len,
                dtype=cfg.dtype,
                batch_tokens=cfg.reference.batch_tokens,
                beat=self.watchdog.beat,
            )
        self._reference_model = model = None
        torch.cuda.empty_cache()  # does nothing on a CPU
        return table

    def setup_model(self) -> None:
        """Model, optimizer and schedule; the memory estimator calls this as well."""
        cfg = self._cfg
        self._model = make_model(cfg, self._mesh, self.device)
        self._optimizer, self._lr_scheduler = make_optimizer(cfg, self._model)
        # Of parameters and the heads that train them: one, unless heads 1 to K - 1 train apart.
        self._groups = head_groups(self._model, self._weighting.decay)
        self._alphas_K = torch.stack([group.alphas_K for group in self._groups]).sum(0)

    # ------------------------------------------------------------- training

    def _loss_step(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """Weighted loss of one micro-batch, summed and not yet divided, with its figures."""
        K, step = self._model.n_future_tokens, self._run.micro_step
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        inputs = {
            "mask": document_mask(batch["doc"]),
            "input_pos": batch["input_pos"],
        }
        reference_BTK = self._reference_BTK(batch, inputs)
        inputs["distill"] = self._model.distill  # heads 1 to K - 1 from head 0, nothing by default

        if self._weighting.needs_losses:
            trained_BTK, losses_BTK, distill_BTK = self._model(
                batch["tokens"], labels_BTK, **inputs
            )
            weights_BTK, stats = self._weighting(
                losses_BTK, mask_BTK, batch["doc"], reference_BTK, step=step
            )
            loss = (self._alphas_K * weights_BTK * trained_BTK).sum()
        else:  # weights known beforehand go into the forward, which saves a matrix product
            own_BT = batch["noise"] if self._weighting.needs_marks else None
            own_BT = batch["weight"] if self._weighting.needs_weights else own_BT
            weights_BTK, stats = self._weighting(None, mask_BTK, batch["doc"], own_BT, step=step)
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
        if reference_BTK is not None:  # to see whether all of them are finite
            sums["reference"] = torch.where(mask_BTK, reference_BTK, 0).sum()
        self._shown = {"step": self._run.step + 1, "batch": batch, "mask_BTK": mask_BTK}
        self._shown["of_heads"] = {"weight": weights_BTK, "loss": losses_BTK.detach()} | (
            {} if reference_BTK is None else {"reference": reference_BTK}
        )
        return loss, sums, stats

    def _reference_BTK(self, batch: dict, inputs: dict) -> torch.Tensor | None:
        """r[b,t,k] of this micro-batch, from the table or from the model."""
        if not self._weighting.needs_scores:
            return None
        if self._reference_model is None:
            reference = batch["reference"]
        else:
            reference = references.reference_losses(
                self._reference_model, batch["tokens"], batch["doc"], **inputs
            )
        return references.align_reference(reference, self._model.n_future_tokens)

    def train(self) -> None:
        cfg, run = self._cfg, self._run
        if self._reference:
            self._beside_model = references.beside_model(*self._reference, run.base_losses())
            for level, text in references.said_of(self._beside_model):
                utils.log_rank_zero(log, text, level=level)
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

    def _heldout_batches(self) -> Iterator[dict]:
        size, ranks = self._cfg.batch_size, (self._rank, self._world)
        return heldout_batches(self._dataset_val, size, *ranks, self.device)

    def validate(self) -> tuple[list[float], dict]:
        """Unweighted loss of each head over the held-out set, and how fast it would decode."""
        batches = self._run.beating(self._heldout_batches())
        return heldout_figures(self._model, batches, self._tokenizer)

    def save_checkpoint(self, folder: Path) -> None:
        """The model in Meta's format, in the dtype that computed the losses."""
        save_meta(self._model, folder, tokenizer_path=self._cfg.tokenizer.path, dtype=self._dtype)

    def finish(self, beside: dict[str, Path]) -> dict:
        """Draw the curves, also of the runs beside it, close everything, return the figures."""
        summary = self._run.summary()
        if self._beside_model:
            summary["reference"] = self._beside_model
        if shares := self._run.noise_shares():
            summary["corrupted_share"] = dict(zip(("data", "selected"), shares, strict=True))
        curves = Path(self._cfg.output_dir) / "curves.png"
        if self._rank == 0:
            own = {controls.name_of(self._cfg): curves.with_name("metrics.jsonl")}
            plot_curves(beside | own, curves)
            self.draw(summary)
        self._run.close(curves, curves.with_name("run.html"))
        return summary

    def draw(self, summary: dict | None = None) -> None:
        """The page of the run as far as it has come; rank 0 calls it."""
        draw_run(self._cfg.output_dir, summary, self._tokenizer, self._shown)

    def replay(self) -> None:
        """Repeat the step at which a run stopped, and train nothing."""
        self._run.replay(self._loss_step)


# ------------------------------------------------------------------ the runs of a config


def train_one(
    cfg: DictConfig,
    device: torch.device,
    mesh: DeviceMesh,
    stops: StopRequests,
    beside: dict[str, Path],
) -> dict:
    """The summary of one training run, which is made unless it is complete already."""
    if cfg.resume_from_checkpoint and (summary := plan.finished(cfg)):
        return summary
    name, started = controls.name_of(cfg), time.perf_counter()
    utils.log_rank_zero(log, f"{name}: {cfg.max_steps} steps, output in {cfg.output_dir}")
    with exit_with_message(ValueError, OSError):
        cfg = fitted(cfg, __file__, device)
        recipe = Rho1WMTPRecipeDistributed(cfg, device, mesh, stops)
        recipe.setup()
    return plan.train(recipe, cfg, stops, beside, started)


def report(cfg: DictConfig, summary: dict) -> None:
    """Print the figures and where everything is."""
    plan.print_losses(summary)
    if "corrupted_share" in summary:
        share = summary["corrupted_share"]
        print(
            f"Noise: {share['data']:.1%} of the training targets, {share['selected']:.1%} of the "
            f"weight that {cfg.weighting.name} gave"
        )
    plan.print_places(Path(cfg.output_dir), summary)


@parse
def recipe_main(cfg: DictConfig) -> None:
    with exit_with_message(ValueError, OSError):
        check(cfg)
        required = plan.required_runs(cfg, check)
    with process_group(cfg) as group:  # device, mesh, and what may end it early
        if cfg.get("replay"):
            cfg = merged(cfg, {"compile": False})  # compiled blocks have no hooks
            with exit_with_message(ValueError, OSError):
                recipe = Rho1WMTPRecipeDistributed(cfg, *group)
                recipe.setup()
                recipe.replay()
            return
        runs = controls.runs_of(cfg, TokenWeighting.NAMES)
        plan.prepare(cfg, runs)
        for one in required:
            with plan.in_turn(one.output_dir):
                train_one(one, *group, {})
        with exit_with_message(ValueError, OSError):
            for one in runs:  # now, not when the runs before have had their hours
                own = make_weighting(one)
                if own.needs_marks or own.needs_weights or one.dataset != cfg.dataset:
                    load_rows(one)
        summary = plan.run_all(runs, lambda one, beside: train_one(one, *group, beside))
        if dist.get_rank() == 0:
            plan.write_summary(Path(cfg.output_dir), summary)
            report(cfg, summary)
            if model_name := (cfg.get("registry") or {}).get("model_name"):
                register_run(cfg.output_dir, model_name)


if __name__ == "__main__":
    sys.exit(recipe_main())
