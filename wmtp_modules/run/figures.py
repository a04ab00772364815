"""Figures of a run: held-out losses, what a step logs, and the peak of memory.

Shapes: B packed rows of a rank's micro-batch, T positions, K heads.
"""

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torchtune.models.llama2 import Llama2Tokenizer

from wmtp_modules.data.packing import PackedDataset
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels, shift_to_heads
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.parallel.process_group import all_reduce_sum
from wmtp_modules.run.acceptance import Acceptance, token_kinds

# Up to here repeated data are worth nearly what new data are (Muennighoff et al. 2023, arXiv
# 2305.16264).
MOST_EPOCHS = 4


class TrainingError(ValueError):
    """What stops a run while it trains, in a sentence for its user."""


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def token_losses(
    model: MTPTransformer, batch: dict, **asked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses_BTK, labels_BTK) of a packed micro-batch, unweighted.

    ``asked`` goes to the forward, whose result stands in place of losses_BTK.
    """
    labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], model.n_future_tokens)
    inputs = {"mask": document_mask(batch["doc"]), "input_pos": batch["input_pos"]}
    return model(batch["tokens"], labels_BTK, **inputs, **asked), labels_BTK


@torch.no_grad()
def heldout_losses(
    model: MTPTransformer,
    batches: Iterable[dict],
    losses_of: Callable[[MTPTransformer, dict], tuple[torch.Tensor, torch.Tensor]] = token_losses,
    whose: str = "the heads",
) -> list[float]:
    """Unweighted loss of each head over all batches of all ranks, equal on all ranks.

    Every rank has as many batches. The model is left in the mode it was in.

    Args:
        losses_of: gives (losses_BTK, labels_BTK); a loss is 0 where there is no target.
        whose: losses they are, for an error.

    Returns:
        K losses in nats per token.

    Raises:
        TrainingError: if a head has no target in all of them, or its loss is not finite.
    """
    was_training = model.training
    model.eval()
    sums = []
    for batch in batches:
        losses_BTK, labels_BTK = losses_of(model, batch)
        n_K = (labels_BTK != IGNORE_INDEX).sum((0, 1))
        sums.append(torch.stack([losses_BTK.double().sum((0, 1)), n_K.double()]))
    model.train(was_training)
    (sums_2K,) = all_reduce_sum(torch.stack(sums).sum(0))
    if (sums_2K[1] == 0).any():
        head = int((sums_2K[1] == 0).nonzero()[0])
        raise TrainingError(
            f"no held-out text is long enough for head {head}, which predicts {head + 1} tokens "
            "ahead: take a longer dataset_val"
        )
    losses = (sums_2K[0] / sums_2K[1]).tolist()
    if not all(map(math.isfinite, losses)):
        raise TrainingError(
            f"the held-out losses of {whose} are {losses}: check the checkpoint and the dtype"
        )
    return losses


def heldout_figures(
    model: MTPTransformer, batches: Iterable[dict], tokenizer: Llama2Tokenizer
) -> tuple[list[float], dict]:
    """Held-out losses, and of the same forwards how fast the model would decode by itself.

    Args:
        tokenizer: whose pieces give the classes of positions.

    Returns:
        ``heldout_losses`` and ``Acceptance.figures``, equal on all ranks.
    """
    acceptance = Acceptance(model.n_future_tokens, token_kinds(tokenizer))

    def losses_of(model: MTPTransformer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        (losses_BTK, choices_BTK), labels_BTK = token_losses(model, batch, with_choices=True)
        acceptance.add(choices_BTK, labels_BTK, batch["tokens"], batch["noise"])
        return losses_BTK, labels_BTK

    return heldout_losses(model, batches, losses_of), acceptance.figures()


def mean_of_heads(value_K: torch.Tensor, n_K: torch.Tensor) -> float | None:
    """Mean weighted by the heads' numbers of targets; None if no head has one.

    The value of a head without targets does not matter, it may be NaN.
    """
    has_K = n_K > 0
    if not has_K.any():
        return None
    return ((value_K * n_K)[has_K].sum() / n_K.sum()).item()


def step_metrics(
    sums: Mapping[str, torch.Tensor], stats: Mapping[str, torch.Tensor], alphas_K: torch.Tensor
) -> dict[str, float]:
    """Figures of one optimizer step, to log; what has no targets has no figure.

    Args:
        sums: over all ranks and micro-batches: ``loss_K`` unweighted losses, ``n_K`` targets,
            ``objective`` weighted loss, ``noise`` of ``noise_sums``, and ``distill_K`` losses of
            the distillation if there is one.
        stats: ``weight_stats`` of a joint micro-batch.
    """
    n_K, count_K = sums["n_K"], stats["count"]
    losses_K = sums["loss_K"] / n_K
    metrics = {
        # Unweighted, so that runs under different weightings compare.
        "loss": mean_of_heads(losses_K, alphas_K * n_K),
        **_by_head("loss", losses_K, n_K),
        "ess": mean_of_heads(stats["ess"], count_K),
        "selected_share": mean_of_heads(stats["selected"], count_K),
    }
    for name, value_K in stats.items():
        if name != "count":
            metrics |= _by_head(f"weight_{name}", value_K, count_K)
    if n_K.any():
        metrics["weighted_loss"] = (sums["objective"] / (alphas_K * n_K).sum()).item()
    if "distill_K" in sums:
        of_others_K = n_K * (torch.arange(len(n_K), device=n_K.device) > 0)
        metrics |= _by_head("distill", sums["distill_K"] / n_K, of_others_K)
    in_data, targets, on_noise, weight = sums["noise"].tolist()
    if in_data and weight:
        metrics |= {"noise_in_data": in_data / targets, "noise_in_weight": on_noise / weight}
    return {name: value for name, value in metrics.items() if value is not None}


def _by_head(name: str, value_K: torch.Tensor, n_K: torch.Tensor) -> dict[str, float]:
    pairs = zip(value_K.tolist(), n_K.tolist(), strict=True)
    return {f"{name}_head_{k}": value for k, (value, n) in enumerate(pairs) if n}


class Sums(dict[str, torch.Tensor]):
    """Figures of an optimizer step that are added up: over micro-batches, then over ranks."""

    def __iadd__(self, other: Mapping[str, torch.Tensor]) -> "Sums":
        for name, value in other.items():
            self[name] = self[name] + value if name in self else value
        return self

    def all_reduced(self) -> "Sums":
        """The sums over all ranks, in one collective; fp64."""
        return Sums(zip(self, all_reduce_sum(*self.values()), strict=True))

    def on_host(self) -> "Sums":
        """The same on the CPU, in one copy; waits for the device."""
        flat = torch.cat([value.double().flatten() for value in self.values()]).cpu()
        parts = flat.split([value.numel() for value in self.values()])
        pairs = zip(self.items(), parts, strict=True)
        return Sums({name: part.view(value.shape) for (name, value), part in pairs})


class Throughput:
    """Tokens per second since the last reading, pauses left out."""

    def __init__(self) -> None:
        self._tokens: torch.Tensor | int = 0
        self._started = time.perf_counter()

    def add(self, tokens: torch.Tensor) -> None:
        """Count tokens that are done, or under way on the device."""
        self._tokens = self._tokens + tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that does not count."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def per_second(self) -> float:
        """Read it and begin anew; waits for the device."""
        tokens = float(self._tokens)  # waits, so before the clock is read
        speed = tokens / (time.perf_counter() - self._started)
        self._tokens, self._started = 0, time.perf_counter()
        return speed


def epoch_lines(
    data: PackedDataset, taken: int, packs_per_step: int, max_steps: int, step: int
) -> tuple[str, str]:
    """What an epoch has and how many a run makes, and a warning, empty unless these are many.

    Args:
        taken: packs that an epoch takes, ``packs_of_epoch``.
        step: steps that are done.
    """
    said = (
        f"The data are {data.n_tokens:,} tokens in {len(data):,} packs of {data.max_seq_len:,}, "
        f"{data.padding_share:.2%} padding. An epoch takes {taken:,} packs, a step "
        f"{packs_per_step:,}: {max_steps:,} steps are {max_steps * packs_per_step / taken:.1f} "
        "epochs"
    )
    if step:
        said += f", of which {step * packs_per_step / taken:.1f} are done"
    if max_steps * packs_per_step <= MOST_EPOCHS * taken:
        return f"{said}.", ""
    most = MOST_EPOCHS * taken // packs_per_step
    way_out = f"set max_steps to at most {most:,}, or add data" if most else "add data"
    return f"{said}.", (
        f"That is more than {MOST_EPOCHS} epochs, beyond which repeated data teach little: "
        f"{way_out}."
    )


class Share:
    """Of the times that were counted, the share at which something was so; None of no times."""

    def __init__(self) -> None:
        self._so = self._times = 0
        self._last = (0, 0)  # what these were at the last reading

    def add(self, is_so: bool) -> None:
        self._so, self._times = self._so + is_so, self._times + 1

    def since_last(self) -> float | None:
        """Read it and begin anew."""
        so, times = self._so - self._last[0], self._times - self._last[1]
        self._last = (self._so, self._times)
        return so / times if times else None

    def in_all(self) -> float | None:
        return self._so / self._times if self._times else None

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def noise_sums(
    noise_BT: torch.Tensor, mask_BTK: torch.Tensor, weights_BTK: torch.Tensor
) -> torch.Tensor:
    """Targets on noise, targets, weight on noise, weight: fp32 [4], over all heads."""
    noise_BTK = shift_to_heads(noise_BT, mask_BTK.shape[-1], False) & mask_BTK
    on_noise = (weights_BTK * noise_BTK).sum()
    return torch.stack([noise_BTK.sum(), mask_BTK.sum(), on_noise, weights_BTK.sum()])
