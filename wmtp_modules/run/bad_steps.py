"""Steps that went wrong: losses that are not finite, no target at all, sudden jumps of the loss.

Every rank calls the same functions with figures that are equal on all ranks, so all of them skip a
step or none does.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torchtune.utils import get_logger, log_rank_zero

from wmtp_modules.files import new_file
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import all_gathered
from wmtp_modules.run.figures import token_losses
from wmtp_modules.run.training_state import TrainingStates

log = get_logger("INFO")

# A loss is a spike when it lies as many standard deviations above the mean of the last ones; the
# log should name what is worth a look, not every hard batch.
SPIKE_WINDOW = 64
SPIKE_HISTORY = 16  # losses before any is judged
SPIKE_DEVIATIONS = 6.0


def what_is_wrong(figures: Mapping[str, torch.Tensor | None], n_targets: torch.Tensor) -> str:
    """Why a step must not update anything; empty if it may.

    Args:
        figures: scalars by name, equal on all ranks; None is ignored.
        n_targets: supervised targets of the step, over all ranks, micro-batches and heads.
    """
    if not n_targets.any():
        return "no token is supervised"
    for name, figure in figures.items():
        value = 0.0 if figure is None else float(figure)
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return ""


def row_ids(row_BT: torch.Tensor) -> list[int]:
    """Rows of the data set that a micro-batch holds, from ``row``, which is -1 for padding."""
    return sorted(set(row_BT.flatten().tolist()) - {-1})


class BadSteps:
    """Counts skipped steps and finds those whose loss jumped; ``limit`` skipped in a row end a run.

    Both lists are part of a training state, and ``skipped_steps.jsonl`` and ``loss_spikes.jsonl``
    in ``output_dir`` are written from them, so a resumed run has no step twice. The ``rows`` of a
    step are int64 [B, T] for each micro-batch of this rank, -1 for padding.
    """

    def __init__(self, output_dir: Path, limit: int) -> None:
        self._output_dir = output_dir
        self._limit = limit
        self.skipped: list[dict] = []
        self.spikes: list[dict] = []
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    @property
    def is_over_limit(self) -> bool:
        return self.in_a_row >= self._limit

    def skip(self, step: int, reason: str, rows: list[torch.Tensor]) -> None:
        """Count a step (from 1) that updates nothing, for a reason; a collective."""
        self.in_a_row += 1
        self.skipped.append({"step": step, "reason": reason, "rows": _rows_of_ranks(rows)})
        self._write("skipped_steps.jsonl", self.skipped)
        log_rank_zero(log, f"Step {step} is skipped on all ranks: {reason}.")

    def why_stopped(self, save: Callable[[TrainingStates], None]) -> str:
        """What to tell a user whose run ends after too many skipped steps; a collective.

        ``save`` saves the run among the states it is given, which are those of ``bad_step/``.
        """
        last, folder = self.skipped[-1], self._output_dir
        replay = (
            f"To see where it comes from, run the same command with --config "
            f"{folder / 'config.yaml'} replay={folder / 'bad_step'}"
        )
        try:
            kept = TrainingStates(folder / "bad_step", keep_last=1)
            kept.drop_all()
            save(kept)
            kept.close()
        except OSError as error:  # on all ranks; it must not hide the reason
            replay = f"A replay is not possible: {error}"
        return (
            f"{last['reason']} in step {last['step']}, and the run stops as it was the "
            f"{self.in_a_row}. of {self._limit} skipped steps in a row (max_skipped_steps). What "
            f"was saved before is untouched; {folder / 'skipped_steps.jsonl'} names the rows. "
            f"{replay}. Lower optimizer.lr, or look at the data and the checkpoints"
        )

    def look_for_spike(self, step: int, loss: float, rows: list[torch.Tensor]) -> None:
        """Record a step (from 1) whose unweighted loss is far above the last ones; a collective."""
        self.in_a_row = 0
        last = list(self._losses)
        if math.isfinite(loss):  # else no later loss could be judged
            self._losses.append(loss)
        if len(last) < SPIKE_HISTORY:
            return
        mean, spread = statistics.fmean(last), max(statistics.stdev(last), 1e-6)
        if not loss <= mean + SPIKE_DEVIATIONS * spread:  # NaN is one, too
            told = loss if math.isfinite(loss) else str(loss)  # JSON has neither
            spike = {"step": step, "loss": told, "mean_before": mean, "rows": _rows_of_ranks(rows)}
            self.spikes.append(spike)
            self._write("loss_spikes.jsonl", self.spikes)
            log_rank_zero(log, f"Step {step} is a loss spike: {loss:.3f}, {mean:.3f} before.")

    def state_dict(self) -> dict:
        return {
            "skipped": list(self.skipped),  # a copy: it is written while training goes on
            "spikes": list(self.spikes),
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self.in_a_row = state["in_a_row"]
        self._losses.extend(state["losses"])

    def write_files(self) -> None:
        """Make the files match the lists: nothing of another run or of steps undone."""
        self._write("skipped_steps.jsonl", self.skipped)
        self._write("loss_spikes.jsonl", self.spikes)

    def _write(self, name: str, steps: list[dict]) -> None:
        if dist.get_rank() != 0:
            return
        path = self._output_dir / name
        if not steps:
            path.unlink(missing_ok=True)
            return
        with new_file(path) as unfinished:
            unfinished.write_text("".join(json.dumps(step) + "\n" for step in steps))


# ------------------------------------------------------------------------------ replay


def look_again(model: MTPTransformer, batch: dict, loss_step: Callable[[dict], tuple]) -> list[str]:
    """What in a micro-batch is not finite, forward and backward; collectives of the model.

    Gradients are added to the model. Returns a line that names the rows, and one for each finding.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    modules: list[str] = []  # in the order in which they ran

    def look(module: nn.Module, inputs: tuple, output: object) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        tensors = [x for x in outputs if torch.is_tensor(x) and x.is_floating_point()]
        if module in names and not all(bool(x.isfinite().all()) for x in tensors):
            modules.append(names[module])

    with torch.no_grad():
        losses_BTK, _ = token_losses(model, batch)
    rows = row_ids(batch["row"][~losses_BTK.isfinite().all(-1)])
    handle = register_module_forward_hook(look)
    try:
        loss, _, _ = loss_step(batch)
    finally:
        handle.remove()
    loss.backward()
    gradients = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()  # of this rank
        if gradient is not None and not gradient.isfinite().all():
            gradients.append(name)
    found = {
        "losses that are not finite in rows": rows,
        "first output that is not finite:": modules[:1],
        "gradients that are not finite:": gradients,
    }
    lines = [f"{text} {_shortened(values)}" for text, values in found.items() if values]
    return [f"rows {_shortened(row_ids(batch['row']))}", *lines]


def print_replay(step: int, findings: list[list[str]]) -> None:
    """Print ``look_again`` of every micro-batch of a step, of all ranks on rank 0; a collective."""
    ranks = all_gathered(findings)
    if dist.get_rank() != 0:
        return
    print(f"\nReplay of step {step}")
    is_bad = False
    for rank, micro_batches in enumerate(ranks):
        for number, (rows, *problems) in enumerate(micro_batches, start=1):
            print(f"  rank {rank}, micro-batch {number}: {rows}")
            for problem in problems:
                is_bad = True
                print(f"    {problem}")
    if not is_bad:
        print(
            "  everything is finite this time: the fault is not in these rows and parameters. "
            "Suspect the hardware, or what differs from the run (compile, ranks, precision)"
        )


def _rows_of_ranks(rows: list[torch.Tensor]) -> list[list[list[int]]]:
    """Rows of the data set in one step: [rank][micro-batch], on all ranks."""
    return all_gathered([row_ids(row_BT) for row_BT in rows])


def _shortened(values: list, most: int = 8) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
