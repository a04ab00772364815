"""Rho-1 weighted fine-tuning of a multi-token-prediction model with FSDP2, on one rank or many.

    tune run --nproc_per_node 8 recipes/rho1_wmtp_distributed.py --config configs/rho1/7b.yaml

Rho-1 (Lin et al. 2024, arXiv 2404.07965) trains on the tokens whose loss exceeds that of a
reference model trained on clean data. Here each head k of an MTP model (arXiv 2404.19737) ranks
its own tokens. The same file trains the reference (``n_future_tokens: 1``, uniform weights) and
the controls. Copy it and edit it: nothing imports it.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import DeviceMesh
from torchtune import config, training, utils
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import packed_block_causal_mask
from torchtune.training.metric_logging import MetricLoggerInterface
from tqdm import tqdm

from wmtp_modules.checkpoints.read import (
    check_model,
    check_same_vocabulary,
    load_into,
    model_args_from_folder,
    save_meta,
)
from wmtp_modules.config.check import (
    Above,
    AtLeast,
    Component,
    ConfigError,
    Nullable,
    Optional,
    check_config,
)
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.files import new_file
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, head_alphas, mtp_labels
from wmtp_modules.memory.explain import explain_out_of_memory
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import (
    all_reduce_sum,
    cast_parameters_,
    init_process_group,
    init_weights_,
    patient_barrier,
    rank_zero_first,
    shard_model,
    share_from_rank_zero,
)
from wmtp_modules.progress import progress_bar
from wmtp_modules.reports.curves import plot_curves
from wmtp_modules.run.bad_steps import (
    BadSteps,
    bad_gradients,
    bad_rows,
    first_bad_module,
    print_replay,
    row_ids,
    what_is_wrong,
)
from wmtp_modules.run.figures import (
    TrainingError,
    epoch_dataloader,
    heldout_batches,
    heldout_losses,
    noise_sums,
    peak_memory_gib,
    step_metrics,
    to_device,
)
from wmtp_modules.run.metric_logging import JSONLLogger
from wmtp_modules.run.plan import (
    TRAINING_RULES,
    control_runs,
    is_done,
    one_sentence,
    parse,
    print_losses,
    print_places,
    required_runs,
    write_summary,
)
from wmtp_modules.run.resume import (
    check_not_begun,
    check_not_ended,
    check_same_run,
    notes_on_resume,
    packs_per_step,
    random_state,
    resolved,
    resume_schedule_,
    set_random_state,
)
from wmtp_modules.run.stopping import Stopped, StopRequests, clear_exit, exit_code
from wmtp_modules.run.training_state import TrainingStates
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.reference import align_reference, reference_losses, score_rows
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)
from wmtp_modules.weighting.token_weighting import TokenWeighting

log = utils.get_logger("INFO")
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11
# torchtune's RMSNorm takes fp32 activations and a bf16 scale on purpose.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

OPTIMIZER = Component(
    given=("params",), keys={"lr": Optional(Above(float, 0))}, makes=torch.optim.Optimizer
)

# Every key of a config; what a component takes is read from its signature.
SCHEMA = {
    "output_dir": str,
    "device": ("cuda", "cpu"),
    "dtype": ("bf16", "fp32"),
    "fp32_master_weights": bool,
    "seed": AtLeast(int, 0),
    "resume_from_checkpoint": bool,
    "model": Component(makes=MTPTransformer),
    "checkpointer": Nullable({"checkpoint_dir": str}),  # null: start from nothing
    "tokenizer": Component(
        keys={"path": str, "max_seq_len": AtLeast(int, 2)}, makes=Llama2Tokenizer
    ),
    "dataset": Component(given=("tokenizer",), makes=Dataset),
    "dataset_val": Component(given=("tokenizer",), makes=Dataset),
    "batch_size": AtLeast(int, 1),  # packed rows of a rank's micro-batch
    "gradient_accumulation_steps": AtLeast(int, 1),
    "weighting": TokenWeighting,
    "reference": Optional(
        {
            "mode": ("cached", "online"),
            "checkpointer": {"checkpoint_dir": str},
            "table_dir": str,
            "batch_tokens": AtLeast(int, 1),
        }
    ),
    "optimizer": OPTIMIZER,
    "num_warmup_steps": AtLeast(int, 0),
    "clip_grad_norm": Above(float, 0),
    "max_steps": AtLeast(int, 1),
    "run_val_every_n_steps": AtLeast(int, 1),
    "save_every_n_steps": AtLeast(int, 1),
    "keep_last": AtLeast(int, 1),  # training states
    "max_skipped_steps": AtLeast(int, 1),  # in a row, without an update
    "collective_timeout_s": Above(float, 0),  # a rank that does nothing for longer hangs
    "max_hours": Optional(Above(float, 0)),  # the run saves and ends before
    "replay": Optional(str),  # bad_step/ of a run: look at its last step again, train nothing
    "log_every_n_steps": AtLeast(int, 1),
    "enable_activation_checkpointing": bool,
    "compile": bool,
    "metric_logger": Component(makes=MetricLoggerInterface),
    "profiler": training.setup_torch_profiler,
    # What comes before the run, and beside it for comparison.
    "assets_dir": Optional(str),
    "prepare": Optional(Component()),
    "requires": Optional(list[str]),
    "controls": Optional(list[str]),
}


def check(cfg: DictConfig) -> None:
    """Everything that can be wrong with a config before a process group or a model exists."""
    check_config(cfg, SCHEMA, TRAINING_RULES)
    if "name" not in cfg.weighting:
        raise ConfigError("weighting.name: missing")
    for name in (cfg.weighting.name, *(cfg.get("controls") or [])):
        weighting = make_weighting(OmegaConf.merge(cfg, {"weighting": {"name": name}}))
        if weighting.needs_scores and not cfg.get("reference"):
            raise ConfigError(f"reference: missing, the weighting {weighting.name!r} needs it")


def make_weighting(cfg: DictConfig) -> TokenWeighting:
    return TokenWeighting(**{"seed": cfg.seed, **cfg.weighting})


class Rho1WMTPRecipeDistributed:
    """One training run. ``recipe_main`` below makes the runs of a config, controls included."""

    def __init__(
        self, cfg: DictConfig, device: torch.device, mesh: DeviceMesh, stops: StopRequests
    ) -> None:
        self._cfg = cfg
        self._device = device
        self._mesh = mesh
        self._stops = stops
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._output_dir = Path(cfg.output_dir)
        self._dtype = DTYPES[cfg.dtype]
        # Masters stay fp32 and compute runs in dtype: at a learning rate of 1e-5 most updates of
        # a bf16 parameter round to nothing. Pure bf16 needs stochastic rounding to be of use.
        self._master_dtype = torch.float32 if cfg.fp32_master_weights else self._dtype
        self._weighting = make_weighting(cfg)
        self._step = 0  # optimizer steps done
        self._micro_step = 0
        self._epoch = 0
        self._best_loss = float("inf")
        self._heldout: dict[str, list[float]] = {}  # "base" before training, "last" since
        self._bad_steps = BadSteps(self._output_dir, cfg.max_skipped_steps)
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)
        self._noise_sums = torch.zeros(4, dtype=torch.float64, device=device)  # see _loss_step

    # ---------------------------------------------------------------- setup

    def setup(self) -> None:
        cfg = self._cfg
        training.set_seed(cfg.seed)
        with torch.device("meta"):
            self._model = config.instantiate(cfg.model)
        folder = cfg.checkpointer.checkpoint_dir if cfg.checkpointer else None
        self.model_args = self._model.args
        check_model(self.model_args, cfg.tokenizer.path, cfg.tokenizer.max_seq_len, folder)
        self._alphas_K = head_alphas(self._model.n_future_tokens, self._weighting.decay)
        self._alphas_K = self._alphas_K.to(self._device)

        # Tokenised once by rank 0; the others then read the same cached file.
        tokenizer = config.instantiate(cfg.tokenizer)
        with rank_zero_first():
            rows = config.instantiate(cfg.dataset, tokenizer)
            rows_val = config.instantiate(cfg.dataset_val, tokenizer)

        # Reference losses come first, so that the scorer is gone before training needs memory.
        self._reference_model, scores = None, None
        if self._weighting.needs_scores:
            self._reference_model = self._load_reference()
            if cfg.reference.mode == "cached":
                scores = self._score(rows)
                self._reference_model = None
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

        self._setup_model()
        self._setup_data(rows, rows_val, scores)
        self._optimizer = config.instantiate(cfg.optimizer, self._model.parameters())
        self._lr_scheduler = training.get_cosine_schedule_with_warmup(
            self._optimizer, num_warmup_steps=cfg.num_warmup_steps, num_training_steps=cfg.max_steps
        )
        if cfg.get("replay"):
            self._states = TrainingStates(Path(cfg.replay), keep_last=1)
            self._resume()
            if self._states.last_step is None:
                raise ValueError(f"replay: {cfg.replay} holds no state, name a run's bad_step")
        else:
            self._states = TrainingStates(self._output_dir / "training_state", cfg.keep_last)
            run_id = self._resume() if cfg.resume_from_checkpoint else None
            if self._states.last_step is None:  # what lies there is another run's
                self._states.drop_all()
            self._setup_loggers(run_id)

    def _setup_model(self) -> None:
        cfg = self._cfg
        if not cfg.checkpointer:
            # From nothing (the quickstart's models): made whole and equal on all ranks.
            self._model = config.instantiate(cfg.model)
            init_weights_(self._model, cfg.seed)
        cast_parameters_(self._model, self._master_dtype)
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(
                self._model, auto_wrap_policy={TransformerSelfAttentionLayer}
            )
        if cfg.compile:
            for block in (*self._model.layers, *self._model.heads):
                block.compile()
            self._model.output.loss_impl = "compiled"
        if cfg.fp32_master_weights:
            shard_model(self._model, self._mesh, compute_dtype=self._dtype)
        elif not cfg.checkpointer:  # one rank, nothing to shard or to cast
            self._model.to(self._device)
        if cfg.checkpointer:
            load_into(self._model, cfg.checkpointer.checkpoint_dir, device=self._device)
        self._model.train()

    def _setup_data(self, rows: Dataset, rows_val: Dataset, scores: ScoreTable | None) -> None:
        cfg = self._cfg
        pack = {"max_seq_len": cfg.tokenizer.max_seq_len, "seed": cfg.seed}
        tables = {"reference": scores} if scores else None
        self._dataset = PackedDataset(rows, scores=tables, **pack)
        self._dataset_val = PackedDataset(rows_val, **pack)
        made_from = (
            [fingerprint_rows(rows), fingerprint_rows(rows_val)] if self._rank == 0 else None
        )
        self._made_from = share_from_rank_zero(made_from)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._dataset.set_epoch(self._epoch)
        packs = packs_per_step(self._cfg, self._world)
        self._dataloader = epoch_dataloader(
            self._dataset, self._cfg.batch_size, self._rank, self._world, packs
        )

    def _setup_loggers(self, run_id: str | None) -> None:
        """Rank 0 writes metrics.jsonl always, and to the configured logger besides."""
        cfg = self._cfg
        self._metric_loggers = []
        if self._rank == 0:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            # What an earlier run left here must not look like this one's.
            (self._output_dir / "summary.json").unlink(missing_ok=True)
            clear_exit(self._output_dir)
            self._bad_steps.write_files()
            with new_file(self._output_dir / "config.yaml") as unfinished:
                OmegaConf.save(cfg, unfinished, resolve=True)
            jsonl = JSONLLogger(self._output_dir / "metrics.jsonl", resume_step=self._step)
            known = {"run_id": run_id} if run_id else {}
            self._metric_loggers = [jsonl, config.instantiate(cfg.metric_logger, **known)]
            for logger in self._metric_loggers:
                logger.log_config(cfg)

    def _resume(self) -> str | None:
        """Go on where the newest sound training state stands."""
        folder = self._states.newest()
        if folder is None:
            check_not_ended(self._output_dir)
            log_zero(f"Nothing to resume in {self._output_dir}: starting from step 0.")
            return None
        run = check_same_run(folder, self._cfg, self._world)
        if run["made_from"] != self._made_from:
            raise ValueError(
                f"{folder} was trained on other data than dataset and dataset_val hold now: bring "
                "that back, or start another run with resume_from_checkpoint: false and another "
                "output_dir"
            )
        notes = notes_on_resume(run, self._cfg, self._world, len(self._dataset))
        run, own = self._states.load(folder, self._model, self._optimizer)
        self._step, self._micro_step, self._epoch = run["step"], run["micro_step"], run["epoch"]
        self._best_loss, self._heldout = run["best_loss"], run["heldout"]
        self._noise_sums = run["noise_sums"].to(self._device)
        before = run["config"]
        if self._step % before["run_val_every_n_steps"] and self._step != before["max_steps"]:
            self._heldout.pop("last", None)  # it is of an earlier step
        self._bad_steps.load_state_dict(run["bad_steps"])
        resume_schedule_(self._lr_scheduler, run["lr_scheduler"])
        self._start_epoch()
        self._dataloader.load_state_dict(run["dataloader"])
        if run["world"] == self._world:
            set_random_state(own["rng"], self._device)
        log_zero(" ".join([f"Resumed {folder} after step {self._step}.", *notes]))
        return run["run_id"]

    # ------------------------------------------------------------ reference

    def _load_reference(self) -> torch.nn.Module:
        """The reference, whole on each rank and in compute precision: it only scores."""
        folder = self._cfg.reference.checkpointer.checkpoint_dir
        args = model_args_from_folder(folder, max_seq_len=self._cfg.tokenizer.max_seq_len)
        check_same_vocabulary(self._cfg.tokenizer.path, Path(folder) / "tokenizer.model")
        n_heads, K = args["n_future_tokens"], self._model.n_future_tokens
        if 1 < n_heads < K:
            raise ValueError(
                f"the MTP reference in {folder} has {n_heads} heads, the model {K}: use one with "
                "at least as many heads, or a next-token reference"
            )
        with torch.device("meta"):
            model = mtp_llama2(**args)
        cast_parameters_(model, self._dtype)
        load_into(model, folder, device=self._device)
        return model.eval().requires_grad_(False)

    def _score(self, rows: Dataset) -> ScoreTable:
        """Reference losses of every training row: computed once, kept in ``table_dir``."""
        reference = self._cfg.reference
        folder = reference.checkpointer.checkpoint_dir
        n_heads = self._reference_model.n_future_tokens
        fingerprint = None
        if self._rank == 0:  # reads every byte of the checkpoint: once is enough
            fingerprint = {
                "checkpoint": fingerprint_checkpoint(folder),
                "tokenizer": fingerprint_tokenizer(self._cfg.tokenizer.path),
                "dataset": fingerprint_rows(rows),
                "max_seq_len": self._cfg.tokenizer.max_seq_len,
                "kind": "next-token loss" if n_heads == 1 else "mtp losses",
                "n_heads": n_heads,
                "dtype": self._cfg.dtype,
            }
        fingerprint = share_from_rank_zero(fingerprint)
        with self.watchdog:
            compute_scores(
                reference.table_dir,
                fingerprint,
                rows,
                lambda batch: score_rows(self._reference_model, batch),
                batch_tokens=reference.batch_tokens,
                rank=self._rank,
                world=self._world,
                beat=self.watchdog.beat,
            )
        return ScoreTable.open(reference.table_dir, fingerprint, rows)

    def _reference_BTK(self, batch: dict, inputs: dict) -> torch.Tensor | None:
        """r[b,t,k] of this micro-batch, from the table or from the model."""
        if not self._weighting.needs_scores:
            return None
        if self._reference_model is None:
            reference = batch["reference"]
        else:
            reference = reference_losses(
                self._reference_model, batch["tokens"], batch["doc"], **inputs
            )
        return align_reference(reference, self._model.n_future_tokens)

    # ------------------------------------------------------------- training

    def _loss_step(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """Weighted loss of one micro-batch, summed and not yet divided, with its figures."""
        K = self._model.n_future_tokens
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        inputs = {
            "mask": packed_block_causal_mask(batch["seq_lens"]),
            "input_pos": batch["input_pos"],
        }
        reference_BTK = self._reference_BTK(batch, inputs)

        if self._weighting.needs_losses:
            losses_BTK = self._model(batch["tokens"], labels_BTK, **inputs)
            weights_BTK, stats = self._weighting(
                losses_BTK, mask_BTK, batch["doc"], reference_BTK, step=self._micro_step
            )
            loss = (self._alphas_K * weights_BTK * losses_BTK).sum()
        else:  # weights known beforehand go into the forward, which saves a matrix product
            weights_BTK, stats = self._weighting(
                None, mask_BTK, batch["doc"], None, step=self._micro_step
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
        if reference_BTK is not None:  # to see whether all of them are numbers
            sums["reference"] = torch.where(mask_BTK, reference_BTK, 0).sum()
        return loss, sums, stats

    def train(self) -> None:
        cfg = self._cfg
        if "base" not in self._heldout:
            self._heldout["base"] = self.validate()
        bar = progress_bar(
            total=cfg.max_steps,
            initial=self._step,
            desc=cfg.weighting.name,
            shown=self._rank == 0,
        )
        batches = self._batches()
        profiler = training.DummyProfiler()
        if cfg.profiler.get("enabled"):
            profiler, _ = training.setup_torch_profiler(**cfg.profiler)
        profiler.start()
        window_tokens, window_start = 0, time.perf_counter()  # since the last logged step
        while self._step < cfg.max_steps:
            self._position = self._where()  # a stop before the update goes on from here
            sums, rows = {}, []
            for _ in range(cfg.gradient_accumulation_steps):
                self.watchdog.beat(f"step {self._step + 1}", self._step)
                self._stops.note_save(self._states.seconds)
                if reason := self._stops.agreed():
                    self._stop(reason)
                batch = next(batches)
                rows.append(batch["row"])
                loss, micro_sums, stats = self._loss_step(batch)
                loss.backward()
                sums = {name: sums.get(name, 0) + value for name, value in micro_sums.items()}
                self._micro_step += 1

            # Sum first, divide once: n' counts the targets of all ranks and micro-batches.
            # FSDP2 averages gradients over ranks, hence the factor world.
            sums["failed_saves"] = loss.new_tensor(self._states.has_failed)
            sums = dict(zip(sums, all_reduce_sum(*sums.values()), strict=True))
            n_prime = (self._alphas_K * sums["n_K"]).sum().clamp(min=1e-6)
            training.scale_grads(self._model, self._world / n_prime)
            grad_norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), cfg.clip_grad_norm)
            figures = {"reference loss": sums.get("reference"), "loss": sums["objective"]}
            problem = what_is_wrong(figures | {"gradient norm": grad_norm}, sums["n_K"])
            lr = self._lr_scheduler.get_last_lr()[0]
            if problem:
                self._skip(problem, rows)
            else:
                self._optimizer.step()
                self._noise_sums += sums["noise"]
                loss = (sums["loss_K"] / sums["n_K"].clamp(min=1)).mean().item()
                self._bad_steps.look_for_spike(self._step + 1, loss, rows)
            self._lr_scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._step += 1
            window_tokens = window_tokens + sums["tokens"]

            if self._step % cfg.log_every_n_steps == 0:
                tokens = float(window_tokens)  # waits for the device, so before the clock is read
                speed = tokens / (time.perf_counter() - window_start)
                self._log_step(bar, sums, stats, grad_norm, lr, speed)
                window_tokens, window_start = 0, time.perf_counter()
            bar.update()
            profiler.step()
            paused = time.perf_counter()
            last = self._step == cfg.max_steps
            if last or self._step % cfg.run_val_every_n_steps == 0:
                self._heldout["last"] = self.validate()
                self._save_best()
            if sums["failed_saves"]:
                self._states.wait()  # raises
            # Not in a row of skipped steps: what is kept shall be from before them.
            if last or (self._step % cfg.save_every_n_steps == 0 and not problem):
                self._position = self._where()
                self.save_checkpoint(self._states)
            window_start += time.perf_counter() - paused
        profiler.stop()
        bar.close()
        if "last" not in self._heldout:  # a run that was cut short to the step of its state
            self._heldout["last"] = self.validate()
            self._save_best()
        self._export("last")
        with self.watchdog.paused():
            self._states.wait()

    def _batches(self) -> Iterator[dict]:
        """Micro-batches on the device, epoch after epoch, each packed in an order of its own."""
        while True:
            for batch in self._dataloader:
                yield to_device(batch, self._device)
            self._epoch += 1
            self._start_epoch()

    def _log_step(self, bar: tqdm, sums: dict, stats: dict, grad_norm, lr, tokens_per_s) -> None:
        """One line of figures; with ``stats`` of the step's last joint micro-batch."""
        metrics = step_metrics(sums, stats, self._alphas_K) | {
            "lr": lr,
            "grad_norm": float(grad_norm),
            "tokens_per_s": tokens_per_s,
            "memory_gib": peak_memory_gib(self._device),
            "skipped_steps": len(self._bad_steps.skipped),
        }
        for logger in self._metric_loggers:
            logger.log_dict(metrics, step=self._step)
        heads = [f"{metrics[f'loss_head_{k}']:.2f}" for k in range(len(self._alphas_K))]
        bar.set_postfix_str(
            f"loss {metrics['loss']:.3f} heads {'/'.join(heads)} "
            f"ess {metrics['ess']:.2f} sel {metrics['selected_share']:.2f} "
            f"{metrics['tokens_per_s']:.0f} tok/s {metrics['memory_gib']:.1f} GiB",
            refresh=False,
        )

    def _skip(self, problem: str, rows: list[torch.Tensor]) -> None:
        """Count a step that updates nothing; after too many in a row the run stops.

        ``bad_step/`` then holds the state from before this very step, for ``replay``.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._bad_steps.skip(self._step + 1, problem, rows)
        if self._bad_steps.is_over_limit:
            with self.watchdog.paused():
                raise TrainingError(self._bad_steps.why_stopped(self.save_checkpoint))

    def validate(self) -> list[float]:
        """Unweighted loss of each head over the whole held-out set, equal on all ranks."""
        batches = heldout_batches(
            self._dataset_val, self._cfg.batch_size, self._rank, self._world, self._device
        )
        batches = self.watchdog.beating(batches, f"validation after step {self._step}", self._step)
        heldout = heldout_losses(self._model, batches)
        metrics = {f"val_loss_head_{k}": loss for k, loss in enumerate(heldout)}
        metrics["val_loss"] = sum(heldout) / len(heldout)
        for logger in self._metric_loggers:
            logger.log_dict(metrics, step=self._step)
        return heldout

    # ----------------------------------------------------------- checkpoints

    def _save_best(self) -> None:
        """Keep ``best/`` when the held-out loss, mean over heads, is the lowest since step 0.

        The loss before training does not count, so there is a ``best/`` also where training made
        the model worse: ``heldout_loss.base`` in summary.json tells.
        """
        loss = sum(self._heldout["last"]) / len(self._heldout["last"])
        if loss < self._best_loss:
            self._best_loss = loss
            self._export("best")

    def _export(self, name: str) -> None:
        """A folder in Meta's format, in the dtype that computed the losses."""
        with self.watchdog.paused():
            save_meta(
                self._model,
                self._output_dir / name,
                tokenizer_path=self._cfg.tokenizer.path,
                dtype=self._dtype,
            )

    def _where(self) -> dict:
        """The position of this rank: what the next micro-step reads and draws."""
        return {
            "micro_step": self._micro_step,
            "epoch": self._epoch,
            "dataloader": self._dataloader.state_dict(),
            "rng": random_state(self._device),
        }

    def save_checkpoint(self, states: TrainingStates) -> None:
        """The training state to resume from, written while training goes on."""
        logger = self._metric_loggers[-1] if self._rank == 0 else None
        position = dict(self._position)
        own = {"rng": position.pop("rng")}
        run = position | {
            "step": self._step,
            "best_loss": self._best_loss,
            "heldout": dict(self._heldout),
            "made_from": self._made_from,
            "noise_sums": self._noise_sums.cpu().clone(),
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "bad_steps": self._bad_steps.state_dict(),
            "config": resolved(self._cfg),
            "run_id": getattr(logger, "run_id", None),
        }
        # Within a row of skipped steps the parameters may be what is wrong.
        in_a_row = self._bad_steps.in_a_row > 0
        with self.watchdog.paused():  # the disk may be slow with the one before
            states.save(self._step, self._model, self._optimizer, run, own, keep_older=in_a_row)

    def _stop(self, reason: str) -> None:
        """Save what the last whole step left, and end all runs of this process."""
        if self._states.last_step != self._step:
            self.save_checkpoint(self._states)
        with self.watchdog.paused():
            self._states.wait()
            if self._rank == 0 and hasattr(self._metric_loggers[-1], "run_id"):
                self._metric_loggers[-1].close("KILLED")
        raise Stopped(reason, self._step)

    def replay(self) -> None:
        """The step at which a run stopped, once more: where what is no number comes from."""
        batches, findings = self._batches(), []
        for _ in range(self._cfg.gradient_accumulation_steps):
            batch = next(batches)
            found = {"rows": row_ids(batch["row"]), "bad_rows": bad_rows(self._model, batch)}
            with first_bad_module(self._model) as modules:
                loss, _, _ = self._loss_step(batch)
            loss.backward()
            found |= {"modules": modules[:1], "gradients": bad_gradients(self._model)}
            findings.append(found)
            self._micro_step += 1
        print_replay(self._step + 1, findings)

    def summary(self) -> dict:
        """Held-out loss per head before and after, and how much weight went to noise."""
        in_data, targets, on_noise, weight = self._noise_sums.tolist()
        name = self._cfg.weighting.name
        summary = {
            "steps": self._step,
            "heldout_loss": {"base": self._heldout["base"], name: self._heldout["last"]},
        }
        if self._rank == 0 and hasattr(self._metric_loggers[-1], "location"):
            summary["tracking"] = self._metric_loggers[-1].location
        if in_data:
            summary["corrupted_share"] = {"data": in_data / targets, "selected": on_noise / weight}
        return summary

    def cleanup(self, curves: Path) -> None:
        self._states.close()
        for logger in self._metric_loggers:
            if hasattr(logger, "log_artifact"):
                logger.log_artifact(curves)
            logger.close()


def log_zero(message: str) -> None:
    if dist.get_rank() == 0:
        log.info(message)


# ------------------------------------------------------------------ the runs of a config


def run(
    cfg: DictConfig,
    device: torch.device,
    mesh: DeviceMesh,
    stops: StopRequests,
    beside: dict[str, Path] | None = None,
) -> dict:
    """One training run, or the summary of one that is complete already.

    Args:
        cfg: its config.
        device: this rank's device.
        mesh: data-parallel mesh.
        stops: what may end it early.
        beside: metrics files of other runs, drawn in the same picture.

    Raises:
        Stopped: when it has saved and has to end.
    """
    output_dir = Path(cfg.output_dir)
    if cfg.resume_from_checkpoint and is_done(cfg):
        return json.loads((output_dir / "summary.json").read_text())
    log_zero(f"{cfg.weighting.name}: {cfg.max_steps} steps, output in {output_dir}")
    started = time.perf_counter()
    recipe = Rho1WMTPRecipeDistributed(cfg, device, mesh, stops)
    with one_sentence(ValueError, OSError):
        recipe.setup()
    with (
        one_sentence(TrainingError, OSError),
        explain_out_of_memory(cfg, recipe.model_args, ranks=dist.get_world_size(), device=device),
        stops.step_by_step(),
        recipe.watchdog,
    ):
        recipe.train()
    seconds = round(time.perf_counter() - started, 1)
    # "seconds" of the run that has controls becomes the sum of all.
    summary = recipe.summary() | {"seconds": seconds, "run_seconds": seconds}
    with one_sentence(OSError):
        if dist.get_rank() == 0:
            metrics = (beside or {}) | {cfg.weighting.name: output_dir / "metrics.jsonl"}
            plot_curves(metrics, output_dir / "curves.png")
            write_summary(output_dir, summary)
        recipe.cleanup(output_dir / "curves.png")
    return summary


def report(cfg: DictConfig, summary: dict) -> None:
    """Print the figures and where everything is."""
    print_losses(summary["heldout_loss"], summary["steps"])
    if "corrupted_share" in summary:
        share = summary["corrupted_share"]
        print(
            f"Noise: {share['data']:.1%} of the training targets, {share['selected']:.1%} of the "
            f"weight that {cfg.weighting.name} gave"
        )
    print_places(Path(cfg.output_dir), summary)


@parse
def recipe_main(cfg: DictConfig) -> None:
    with one_sentence(ValueError, OSError):
        check(cfg)
        required = list(required_runs(cfg))
        for one in required:
            check(one)
    with StopRequests(cfg.get("max_hours"), cfg.output_dir) as stops, exit_code(stops):
        with one_sentence(ValueError, OSError):
            device, mesh = init_process_group(cfg.device, cfg.collective_timeout_s)
        if cfg.get("replay"):
            replay(cfg, device, mesh, stops)
        else:
            make_runs(cfg, required, device, mesh, stops)
    patient_barrier()  # a rank that leaves early would abort another's gloo threads
    dist.destroy_process_group()


def make_runs(cfg: DictConfig, required: list[DictConfig], device, mesh, stops) -> None:
    """What comes before the run, its controls, the run itself, and their figures side by side."""
    if not cfg.resume_from_checkpoint:
        with one_sentence(ValueError):  # now, not when the controls have had their hours
            for one in (*control_runs(cfg), cfg):
                check_not_begun(Path(one.output_dir))
    if cfg.get("prepare") and dist.get_rank() == 0:
        with one_sentence(ValueError, OSError):
            config.instantiate(cfg.prepare)
    patient_barrier()
    for required_cfg in required:
        run(required_cfg, device, mesh, stops)

    # Controls first, then the run itself: a claim about weighting is a claim against them.
    heldout, seconds, metrics = {}, 0.0, {}
    for run_cfg in (*control_runs(cfg), cfg):
        summary = run(run_cfg, device, mesh, stops, metrics)
        heldout |= summary["heldout_loss"]
        seconds += summary["run_seconds"]
        metrics[run_cfg.weighting.name] = Path(run_cfg.output_dir) / "metrics.jsonl"
    summary |= {"heldout_loss": heldout, "seconds": round(seconds, 1)}
    if dist.get_rank() == 0:
        write_summary(Path(cfg.output_dir), summary)
        report(cfg, summary)


def replay(cfg: DictConfig, device, mesh, stops) -> None:
    """Look at the step at which a run stopped, and leave its files as they are."""
    cfg = OmegaConf.merge(cfg, {"compile": False})  # compiled blocks have no hooks
    recipe = Rho1WMTPRecipeDistributed(cfg, device, mesh, stops)
    with one_sentence(ValueError, OSError):
        recipe.setup()
    recipe.replay()


if __name__ == "__main__":
    sys.exit(recipe_main())
