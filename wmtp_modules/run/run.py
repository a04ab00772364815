"""What a training run keeps about itself: position, figures, states, loggers, and when to stop.

Both training recipes drive one, and it never touches a loss. Every rank makes one and calls the
same methods in the same order.

Shapes: K heads.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training, utils

from wmtp_modules.config.rules import what_waits
from wmtp_modules.data.loader import EpochLoader, packs_of_epoch, to_device
from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.files import new_file
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.sharding import sync_gradients_
from wmtp_modules.progress import progress_bar
from wmtp_modules.run import resume
from wmtp_modules.run.acceptance import acceptance_metrics
from wmtp_modules.run.bad_steps import BadSteps, look_again, print_replay, what_is_wrong
from wmtp_modules.run.controls import name_of
from wmtp_modules.run.figures import (
    Share,
    Sums,
    Throughput,
    TrainingError,
    epoch_lines,
    mean_of_heads,
    peak_memory_gib,
    step_metrics,
)
from wmtp_modules.run.metric_logging import (
    STOP_S,
    JSONLLogger,
    MLflowLogger,
    describe_machine,
    make_logger,
)
from wmtp_modules.run.start import launched_as
from wmtp_modules.run.stopping import Stopped, StopRequests, clear_exit
from wmtp_modules.run.training_state import TrainingStates
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import fingerprint_checkpoint

log = utils.get_logger("INFO")


class Run:
    """One training run, from its state to resume from to its last checkpoint.

    Args:
        made_from: names data, scores and so on; a state made from others is refused.
        validate: gives ``heldout_figures``, equal on all ranks.
        export: writes the model to a folder.
        draw: writes the run's page, on rank 0.
        kept: what else a resumed run must find again: tensors and plain values by name.

    Attributes:
        step, micro_step: optimizer steps and micro-steps done.
        heldout: held-out losses, "base" before training and "last" since.
        acceptance: how fast it would decode, ``Acceptance.figures``, likewise.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        device: torch.device,
        stops: StopRequests,
        watchdog: Watchdog,
        model: MTPTransformer,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        dataset: PackedDataset,
        alphas_K: torch.Tensor,
        made_from: Any,
        validate: Callable[[], tuple[list[float], dict]],
        export: Callable[[Path], None],
        draw: Callable[[], None],
        kept: dict[str, Any] | None = None,
    ) -> None:
        self._cfg = cfg
        self._device = device
        self._stops = stops
        self._watchdog = watchdog
        self._model = model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._dataset = dataset
        self._alphas_K = alphas_K.cpu()
        self._made_from = made_from
        self._base = self._frozen_base()
        self._validate = validate
        self._export, self._draw = export, draw
        self.kept = kept or {}
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.step = self.micro_step = self._epoch = 0
        self._logged_epoch = -1
        self.heldout: dict[str, list[float]] = {}
        self.acceptance: dict[str, dict] = {}
        self._best_loss = float("inf")
        self._output_dir = Path(cfg.output_dir)
        self._bad_steps = BadSteps(self._output_dir, cfg.max_skipped_steps)
        self._states = TrainingStates(self._output_dir / "training_state", cfg.keep_last)
        self._loggers: list = []  # on rank 0; the last one is the configured one
        self._profiler: Any = training.DummyProfiler()
        self._bar = progress_bar(desc="", shown=False)
        self._throughput = Throughput()
        self._clipped = Share()  # of the updates
        self._noise_sums = torch.zeros(4, dtype=torch.float64)  # of the updates, ``noise_sums``
        self._dataloader = self._epoch_loader()
        self._batches = self._endless_batches()
        self._waits = what_waits(cfg, self.world)
        self._position: dict[str, Any] = {}  # where a state that is saved goes on
        self._rows: list[torch.Tensor] = []  # of the data set, in each micro-batch of this step
        self._problem = ""  # why this step must not update anything
        self._read = Sums()  # what was read of it

    # ---------------------------------------------------------------- begin

    def begin(self) -> None:
        """Resume if the config asks for it and there is a state, and open the loggers."""
        run_id = self._resume() if self._cfg.resume_from_checkpoint else None
        if self._states.last_step is None:  # what lies there is another run's
            self._states.drop_all()
        self._say_epochs()
        if self.rank != 0:
            return
        self._output_dir.mkdir(parents=True, exist_ok=True)
        # What an earlier run left here must not look like this one's.
        stale = () if self.step else ("tokens.json", "run.html")
        for name in ("summary.json", *stale):
            (self._output_dir / name).unlink(missing_ok=True)
        clear_exit(self._output_dir)
        self._bad_steps.write_files()
        shown = OmegaConf.create(resume.kept(self._cfg))
        with new_file(self._output_dir / "config.yaml") as unfinished:
            unfinished.write_text(f"# {launched_as()}\n{OmegaConf.to_yaml(shown)}", "utf-8")
        jsonl = JSONLLogger(self._output_dir / "metrics.jsonl", resume_step=self.step)
        # Without a state to go on from it is the same run in MLflow if its config is the same.
        from_start = None if self._cfg.resume_from_checkpoint else False
        resume_tracking = True if self._states.last_step is not None else from_start
        logger = make_logger(self._cfg, self._output_dir, run_id, resume_tracking)
        self._loggers = [one for one in (jsonl, logger) if one is not None]
        shown.output_dir = str(self._output_dir)  # torchtune's loggers write there; no URL then
        for one in self._loggers:
            one.log_config(shown)
        if isinstance(logger, MLflowLogger):
            tables = self._dataset.scores_made_from.items()
            tags = {f"scores.{name}": json.dumps(fingerprint) for name, fingerprint in tables}
            machine = describe_machine(self._device, self.world)
            logger.log_tags(tags | machine | {"made_from": self._made_from})
            logger.log_artifact(self._output_dir / "run.html")  # however the run ends

    def _resume(self) -> str | None:
        """Continue from the newest sound training state; returns the logger's run."""
        folder = self._states.newest()
        if folder is None:
            resume.check_not_ended(self._output_dir)
            utils.log_rank_zero(
                log, f"Nothing to resume in {self._output_dir}: starting from step 0."
            )
            return None
        run = resume.check_same_run(folder, self._cfg, self.world)
        if run["made_from"] != self._made_from:
            raise ValueError(
                f"{folder} was trained on other data, rewards or values than the config names now: "
                "bring those back, or start another run with resume_from_checkpoint: false and "
                "another output_dir"
            )
        if run.get("base") != self._base:
            raise ValueError(
                f"{folder} holds adapters or heads of another model than "
                "checkpointer.checkpoint_dir does now: bring that back, or start another run with "
                "resume_from_checkpoint: false and another output_dir"
            )
        self._dataset.set_epoch(run["epoch"])
        resume.check_packing(folder, run, self._dataset.packing)
        notes = resume.notes_on_resume(run, self._cfg, self.world, len(self._dataset))
        run, own = self._states.load(folder, self._model, self._optimizer)
        self.load_state_dict(run)
        before, now = run["lr_scheduler"]["_last_lr"][0], self._lr_scheduler.get_last_lr()[0]
        notes += resume.note_on_length(run["config"], self._cfg, float(before), float(now))
        if run["world"] == self.world and own is not None:
            resume.set_random_state(own["rng"], self._device)
        utils.log_rank_zero(
            log, ". ".join([f"Resumed {folder} after step {self.step}", *notes]) + "."
        )
        return run["run_id"]

    def _frozen_base(self) -> str | None:
        """Hash of the checkpoint of which something stays frozen: no state holds that."""
        is_frozen = self._cfg.get("lora") is not None or self._cfg.get("extra_heads") == "only"
        if not is_frozen or not self._cfg.checkpointer:
            return None
        folder = self._cfg.checkpointer.checkpoint_dir
        return self._watchdog.on_rank_zero(lambda: fingerprint_checkpoint(folder))

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks in a state: plain values and tensors."""
        return {
            **self._position,
            "step": self.step,
            "logged_epoch": self._logged_epoch,
            "best_loss": self._best_loss,
            "heldout": dict(self.heldout),
            "acceptance": dict(self.acceptance),
            "made_from": self._made_from,
            "base": self._base,
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "bad_steps": self._bad_steps.state_dict(),
            "clipped": self._clipped.state_dict(),
            "noise_sums": self._noise_sums,
            "config": resume.kept(self._cfg),
            "run_id": getattr(self._loggers[-1], "run_id", None) if self._loggers else None,
            **{k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in self.kept.items()},
        }

    def load_state_dict(self, run: dict[str, Any]) -> None:
        self.step, self.micro_step, self._epoch = run["step"], run["micro_step"], run["epoch"]
        self._logged_epoch = run["logged_epoch"]
        self._best_loss, self.heldout = run["best_loss"], run["heldout"]
        self.acceptance = run.get("acceptance", {})  # older states have none
        before = run["config"]
        if self.step % before["run_val_every_n_steps"] and self.step != before["max_steps"]:
            for figures in (self.heldout, self.acceptance):
                figures.pop("last", None)  # it is of an earlier step
        for name in self.kept:
            value = run[name]
            self.kept[name] = value.to(self._device) if torch.is_tensor(value) else value
        self._bad_steps.load_state_dict(run["bad_steps"])
        self._clipped.load_state_dict(run["clipped"])
        self._noise_sums = run["noise_sums"]
        resume.resume_schedule_(self._lr_scheduler, run["lr_scheduler"])
        self._dataloader = self._epoch_loader()
        self._dataloader.load_state_dict(run["dataloader"])

    def _where(self) -> dict:
        """The position of this rank: what the next micro-step reads and draws."""
        return {
            "micro_step": self.micro_step,
            "epoch": self._epoch,
            "packing": self._dataset.packing,
            "dataloader": self._dataloader.state_dict(),
            "rng": resume.random_state(self._device),
        }

    def _say_epochs(self) -> None:
        """Print what an epoch has and how many the run makes; warn where that is many."""
        cfg, each = self._cfg, resume.packs_per_step(self._cfg, self.world)
        taken = packs_of_epoch(len(self._dataset), self.world * cfg.batch_size, each)
        data, many = epoch_lines(self._dataset, taken, each, cfg.max_steps, self.step)
        utils.log_rank_zero(log, data)
        if many:
            utils.log_rank_zero(log, many, level=logging.WARNING)

    # ------------------------------------------------------------- the steps

    def start_steps(self) -> None:
        """Held-out loss before training, progress bar and profiler."""
        cfg = self._cfg
        self.base_losses()
        if cfg.profiler.get("enabled"):
            self._profiler, _ = training.setup_torch_profiler(**cfg.profiler)
        self._profiler.start()
        name, shown = name_of(cfg), self.rank == 0
        self._bar = progress_bar(total=cfg.max_steps, initial=self.step, desc=name, shown=shown)
        self._throughput = Throughput()

    def base_losses(self) -> list[float]:
        """Held-out loss of each head before training, computed once, resumed or not."""
        if "base" not in self.heldout:
            self._look_at_heldout("base")
        return self.heldout["base"]

    def _epoch_loader(self) -> EpochLoader:
        self._dataset.set_epoch(self._epoch)
        ranks, packs = (self.rank, self.world), resume.packs_per_step(self._cfg, self.world)
        how = {
            "workers": self._cfg.get("dataloader_workers") or 0,
            "pin_memory": self._device.type == "cuda",
        }
        return EpochLoader(self._dataset, self._cfg.batch_size, *ranks, packs, **how)

    def _endless_batches(self) -> Iterator[dict]:
        """Micro-batches on the device, epoch after epoch, each packed in an order of its own."""
        while True:
            for batch in self._dataloader:
                yield to_device(batch, self._device)
            self._epoch += 1
            self._dataloader = self._epoch_loader()

    def micro_batches(self) -> Iterator[dict]:
        """This rank's micro-batches of one optimizer step.

        Before each it tells the watchdog that the rank is alive and stops if asked to, and tells
        the model whether gradients go to other nodes after it.

        Raises:
            Stopped: on all ranks, after the last whole step is saved.
        """
        self._position = self._where()  # a stop before the update goes on from here
        self._rows = []
        last = self._cfg.gradient_accumulation_steps - 1
        for index in range(last + 1):
            self._watchdog.beat(f"step {self.step + 1}", self.step)
            self._stops.note_save(self._states.seconds)
            if reason := self._stops.agreed():
                self._stop(reason)
            batch = next(self._batches)
            self._rows.append(batch["row"])
            sync_gradients_(self._model, self._waits, index == last)
            yield batch
            self.micro_step += 1

    def new_sums(self) -> Sums:
        """Sums of a step; that a state could not be written is told to the other ranks in them."""
        failed = torch.full((), float(self._states.has_failed), device=self._device)
        return Sums(failed_saves=failed)

    def update(self, sums: Sums, norms: torch.Tensor) -> None:
        """Take the optimizer's step, or none on any rank where a figure is not finite.

        The host reads the device here, once in a step. A fused optimizer is told on the device
        whether to change anything, and lies in its queue by then; any other one waits to be called.

        Args:
            sums: over all ranks.
            norms: of ``head_groups``, before clipping.

        Raises:
            TrainingError: as ``may_update``.
        """
        optimizer: Any = self._optimizer
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            if self.may_update(sums, norms):
                optimizer.step()
            return
        figures = [sums["objective"], norms.sum().double()]
        figures += [sums["reference"]] if "reference" in sums else []
        is_good = torch.stack(figures).isfinite().all() & sums["n_K"].any()
        # What torch's GradScaler sets; neither moments nor the count of steps change then.
        optimizer.grad_scale, optimizer.found_inf = None, (~is_good).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        self.may_update(sums, norms)

    def may_update(self, sums: Sums, grad_norm: torch.Tensor) -> bool:
        """Whether the step may update, the same on all ranks; else it is skipped and recorded.

        ``sums`` are over all ranks, ``grad_norm`` is before clipping: of the whole model, or of
        each of its ``head_groups``.

        Raises:
            TrainingError: after too many skipped steps in a row. ``bad_step/`` then holds the state
                from before this very step, for ``replay``.
        """
        self._read = sums = Sums(sums, norms=grad_norm.reshape(-1)).on_host()
        figures = {"reference loss": sums.get("reference"), "loss": sums["objective"]}
        figures |= {"gradient norm": sums["norms"].sum()}
        self._problem = what_is_wrong(figures, sums["n_K"])
        if not self._problem:
            loss = mean_of_heads(sums["loss_K"] / sums["n_K"], self._alphas_K * sums["n_K"])
            if loss is not None:  # else the step is one of those that are skipped
                self._bad_steps.look_for_spike(self.step + 1, loss, self._rows)
            return True
        self._optimizer.zero_grad(set_to_none=True)
        self._bad_steps.skip(self.step + 1, self._problem, self._rows)
        if self._bad_steps.is_over_limit:
            with self._watchdog.paused():
                raise TrainingError(self._bad_steps.why_stopped(self.save_checkpoint))
        return False

    def end_step(self, sums: Sums, stats: dict, grad_norm: torch.Tensor, lr: float) -> None:
        """Log, validate, keep the best model and save, each when it is due.

        ``stats`` are ``weight_stats`` of the last joint micro-batch, the rest as in ``may_update``,
        which has read it.
        """
        cfg, sums = self._cfg, self._read
        norms = sums["norms"].tolist()
        self.step += 1
        self._throughput.add(sums["tokens"])
        if not self._problem:
            self._clipped.add(norms[0] > cfg.clip_grad_norm)
            self._noise_sums = self._noise_sums + sums["noise"]
        if self.step % cfg.log_every_n_steps == 0:
            self._log_step(sums, stats, norms, lr)
        if self._epoch != self._logged_epoch:
            self._log({"epoch": self._epoch, "padding_share": self._dataset.padding_share})
            self._logged_epoch = self._epoch
        self._bar.update()
        self._profiler.step()
        is_last = self.step == cfg.max_steps
        with self._throughput.paused():
            if is_last or self.step % cfg.run_val_every_n_steps == 0:
                self._evaluate()
            if sums["failed_saves"]:
                self._states.wait()  # raises
            # Not in a row of skipped steps: what is kept must be from before them.
            if is_last or (self.step % cfg.save_every_n_steps == 0 and not self._problem):
                self._position = self._where()
                self.save_checkpoint(self._states)

    def _log_step(self, sums: Sums, stats: dict, norms: list[float], lr: float) -> None:
        tokens_per_s, padding = self._throughput.per_second(), self._dataset.padding_share
        metrics = step_metrics(sums, Sums(stats).on_host(), self._alphas_K) | {
            "lr": lr,
            "grad_norm": norms[0],
            "tokens_per_s": tokens_per_s,  # without padding
            "padding_share": padding,
            "memory_gib": peak_memory_gib(self._device),
            "skipped_steps": len(self._bad_steps.skipped),
        }
        if len(norms) > 1:  # the first is of trunk and head 0
            metrics["grad_norm_extra_heads"] = norms[1]
        if (clipped := self._clipped.since_last()) is not None:
            metrics["clipped_share"] = clipped
        self._log(metrics)

        def told(name: str, digits: int) -> str:
            return f"{metrics[name]:.{digits}f}" if name in metrics else "-"

        heads = "/".join(told(f"loss_head_{k}", 2) for k in range(len(self._alphas_K)))
        self._bar.set_postfix_str(
            f"loss {told('loss', 3)} heads {heads} ess {told('ess', 2)} "
            f"sel {told('selected_share', 2)} {tokens_per_s:.0f} tok/s "
            f"pad {padding:.1%} {metrics['memory_gib']:.1f} GiB",
            refresh=False,
        )

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self._loggers:
            logger.log_dict(metrics, step=self.step)

    def beating(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Held-out batches; before each the watchdog hears that this rank is alive."""
        return self._watchdog.beating(batches, f"validation after step {self.step}", self.step)

    def _look_at_heldout(self, when: str) -> None:
        """Validate, and log and keep the figures."""
        self.heldout[when], self.acceptance[when] = losses, acceptance = self._validate()
        metrics = {f"val_loss_head_{k}": loss for k, loss in enumerate(losses)}
        metrics["val_loss"] = sum(losses) / len(losses)
        self._log(metrics | acceptance_metrics(acceptance))

    def _evaluate(self) -> None:
        """Validate, and keep ``best/`` when the mean over heads is the lowest since step 0.

        The loss before training does not count, so there is a ``best/`` even if training made the
        model worse: ``heldout_loss.base`` in summary.json tells.
        """
        self._look_at_heldout("last")
        loss = sum(self.heldout["last"]) / len(self.heldout["last"])
        if loss < self._best_loss:
            self._best_loss = loss
            with self._watchdog.paused():
                self._export(self._output_dir / "best")

    # ------------------------------------------------------- save, stop, end

    def save_checkpoint(self, states: TrainingStates) -> None:
        """Save the training state to resume from, among these; training goes on meanwhile."""
        run = self.state_dict()
        own = {"rng": run.pop("rng")}
        # Within a row of skipped steps the parameters may be what is wrong.
        in_a_row = self._bad_steps.in_a_row > 0
        with self._watchdog.paused():  # the disk may be slow with the one before
            states.save(self.step, self._model, self._optimizer, run, own, keep_older=in_a_row)

    def _stop(self, reason: str) -> None:
        """Save the last whole step, and end all runs of this process."""
        if self._states.last_step != self.step:
            self.save_checkpoint(self._states)
        with self._watchdog.paused():
            self._states.wait()
            if self.rank == 0:  # what follows may be cut short
                self._stops.write_down(Stopped(reason, self.step))
                self._draw()
                if isinstance(self._loggers[-1], MLflowLogger):
                    self._loggers[-1].close("KILLED", reason, patience=STOP_S)
        raise Stopped(reason, self.step)

    def finish_steps(self) -> None:
        """Write ``last/`` and wait until the newest state is on the disk."""
        self._profiler.stop()
        self._bar.close()
        if "last" not in self.heldout:  # a run that was cut short to the step of its state
            self._evaluate()
        with self._watchdog.paused():
            self._export(self._output_dir / "last")
            self._states.wait()

    def summary(self) -> dict:
        """Held-out loss per head and acceptance before and after, and where the logger has it."""
        names = {"base": "base", "last": name_of(self._cfg)}
        summary: dict = {"steps": self.step}
        summary["heldout_loss"] = {names[when]: self.heldout[when] for when in names}
        acceptance = {names[when]: one for when, one in self.acceptance.items() if one}
        tokens = {name: one["tokens_per_forward"] for name, one in acceptance.items()}
        summary |= {"tokens_per_forward": tokens, "acceptance": acceptance}
        summary["data"] = {"tokens": self._dataset.n_tokens, "packs": len(self._dataset)}
        if (clipped := self._clipped.in_all()) is not None:
            summary["clipped_share"] = clipped
        if self._loggers and hasattr(self._loggers[-1], "location"):
            summary["tracking"] = self._loggers[-1].location
        return summary

    def noise_shares(self) -> tuple[float, float] | None:
        """Shares of marked targets: of all targets, and of the weight; None if none is marked."""
        in_data, targets, on_noise, weight = self._noise_sums.tolist()
        return (in_data / targets, on_noise / weight) if in_data and weight else None

    def close(self, *artifacts: Path) -> None:
        """Give files to the loggers that take them, and close everything."""
        self._states.close()
        for logger in self._loggers:
            if hasattr(logger, "log_artifact"):
                for path in filter(Path.exists, artifacts):
                    logger.log_artifact(path)
            logger.close()

    def replay(self, loss_step: Callable[[dict], tuple]) -> None:
        """Repeat the step at which a run stopped, with the recipe's loss step: what is not finite?

        Raises:
            ValueError: if the folder that ``replay`` names holds no state.
        """
        self._states = TrainingStates(Path(self._cfg.replay), keep_last=1)
        self._resume()
        if self._states.last_step is None:
            raise ValueError(f"replay: {self._cfg.replay} holds no state, name a run's bad_step")
        findings = []
        for _ in range(self._cfg.gradient_accumulation_steps):
            findings.append(look_again(self._model, next(self._batches), loss_step))
            self.micro_step += 1
        print_replay(self.step + 1, findings)
