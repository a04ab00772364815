"""Peak memory of one rank's training step, found by taking the step with tensors without contents.

The model, its sharding, the loss, the weighting and the optimizer are those of the recipes. They
run under ``FakeTensorMode`` with a fake process group, and torch's memory tracker adds up what is
alive after each operation. No GPU, checkpoint or data is needed, and almost no memory.

What is not in it: a GPU's context, libraries and fragmentation, compiled blocks (counted as eager,
which needs more), validation, and the copies that saving makes.

Shapes: B packed rows of a rank's micro-batch, T positions, K heads.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune import config, training
from torchtune.modules import TransformerSelfAttentionLayer

import wmtp_modules.loss.linear_cross_entropy as loss_module
from wmtp_modules.checkpoints.read import model_args_from_folder
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, head_alphas, mtp_labels
from wmtp_modules.loss.value_loss import regression_loss, response_mask
from wmtp_modules.models import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.sharding import DTYPES, cast_parameters_, shard_model
from wmtp_modules.scoring.reference import align_reference, reference_losses
from wmtp_modules.weighting.advantage import CriticWeighting
from wmtp_modules.weighting.token_weighting import TokenWeighting

CPU = torch.device("cpu")  # where tensors without contents say they are
CRITIC_HELDOUT_BATCH = 32  # HELDOUT_BATCH of the critic's recipe

# What the trackers call things, put together to what a user can do something about.
PARTS = {
    "parameters": ("Sharded Param", "Parameter", "Buffer"),
    "gathered parameters": ("Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter", "Gradient"),
    "optimizer state": ("OptState", "Optstate"),
    "activations and logits": ("Activation", "Temp"),
    "batch and reference model": ("Inputs", "Other"),
}


@dataclass(frozen=True)
class Estimate:
    """Peak of one rank.

    Attributes:
        peak: bytes of all tensors at that moment.
        where: "forward", "backward" or "optimizer".
        parts: bytes by the names of ``PARTS``; together they are the peak.
    """

    peak: int
    where: str
    parts: dict[str, int]


class _Peak:
    """Beside a tracker: keeps the largest total of a run instead of one for each module.

    The trackers look at every module after each operation, which takes as long as the rest.
    """

    where = ""
    peak = 0
    at_peak: tuple = ("", {})

    def _update_peak_stats(self, _) -> None:
        alive = self._curr_mem_snap.get(CPU, {"Total": 0})
        if alive["Total"] > self.peak:
            self.peak, self.at_peak = alive["Total"], (self.where, dict(alive))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.logsumexp.default:
            # Its kernel holds exp(x - max), as large as x, which no tracker sees.
            inside = torch.empty_like(args[0])
            self._track(self._ref_class.ACT, inside)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def estimate(self) -> Estimate:
        where, alive = self.at_peak
        parts = {part: sum(alive.get(n, 0) for n in names) for part, names in PARTS.items()}
        return Estimate(self.peak, where, parts)


class _ShardedTracker(_Peak, FSDPMemTracker):
    pass


class _WholeTracker(_Peak, MemTracker):
    pass


def estimate_step(cfg: DictConfig, ranks: int) -> Estimate:
    """Peak memory of one rank in a step after the first, when the optimizer has its state.

    Args:
        cfg: config of a recipe that trains; it has ``stages`` if it is the critic's, whose policy
            stage this is about.
        ranks: size of the process group.

    Raises:
        ValueError: if an online reference's folder is not there: its size is read from it.
    """
    reference_args = _online_reference_args(cfg)  # before the fake mode: it reads files
    _make_tables(cfg)
    chunk = loss_module.CHUNK_LOGITS_CUDA if cfg.device == "cuda" else loss_module.CHUNK_LOGITS_CPU
    with (
        _fake_world(ranks) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(loss_module, "CHUNK_LOGITS_CPU", chunk),
    ):
        return _Step(cfg, mesh, reference_args).estimate()


def estimate_trunk(cfg: DictConfig) -> Estimate:
    """Peak memory of the critic's stages before the policy, at most: rows may be shorter than T.

    Each rank holds the frozen model whole and computes values of a batch of rows without gradient;
    a step of the value head needs less than that.

    Args:
        cfg: config of the critic's recipe with its block ``critic``.
    """
    pairs = 2 if cfg.critic.objective == "pairwise" else 1
    rows = max(CRITIC_HELDOUT_BATCH, pairs * cfg.critic.batch_size)
    tokens_BT = torch.zeros(rows, cfg.tokenizer.max_seq_len, dtype=torch.int64)
    with _fake_world(1), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = config.instantiate(cfg.model).eval()
        cast_parameters_(model, DTYPES[cfg.dtype])
        head = ValueHead(model.args["embed_dim"])
        tracker = _WholeTracker()
        tracker.where = "forward"
        tracker.track_external(model, head)
        with tracker:
            head(model.trunk(tokens_BT))
    return tracker.estimate()


def _make_tables(cfg: DictConfig) -> None:
    """Have an optimizer of few bits compute the tables it keeps, which takes real numbers."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=DTYPES[cfg.dtype]))
    parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        config.instantiate(cfg.optimizer, [parameter]).step()


@contextlib.contextmanager
def _fake_world(ranks: int) -> Iterator[DeviceMesh]:
    """The mesh of a process group that says it has so many ranks and moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def make_weighting(cfg: DictConfig) -> TokenWeighting:
    kind = CriticWeighting if "stages" in cfg else TokenWeighting
    return kind(**{"seed": cfg.seed, **cfg.weighting})


def _online_reference_args(cfg: DictConfig) -> dict | None:
    reference = cfg.get("reference")
    if not reference or reference.mode != "online" or not make_weighting(cfg).needs_scores:
        return None
    folder = reference.checkpointer.checkpoint_dir
    return model_args_from_folder(folder, max_seq_len=cfg.tokenizer.max_seq_len)


class _Step:
    """What ``setup`` and ``train`` of the recipes make, as far as it takes memory."""

    def __init__(self, cfg: DictConfig, mesh: DeviceMesh, reference_args: dict | None) -> None:
        self._cfg = cfg
        self._dtype = DTYPES[cfg.dtype]
        self._weighting = make_weighting(cfg)
        self._model = self._make_model(mesh)
        self._reference = self._make_reference(reference_args) if reference_args else None
        self._optimizer = config.instantiate(cfg.optimizer, self._model.parameters())
        # torchao compiles its step, one kernel for each parameter and no tensors between; taken
        # eagerly it would seem to need many. So only the step that makes the state is taken.
        self._optimizer_is_compiled = type(self._optimizer).__module__.startswith("torchao.")
        if cfg.device == "cuda":
            # What torch.optim would choose there; on a CPU it goes through one by one.
            for group in self._optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
        self._batch = self._make_batch()

    def _make_model(self, mesh: DeviceMesh) -> MTPTransformer:
        cfg = self._cfg
        model = config.instantiate(cfg.model)
        cast_parameters_(model, torch.float32 if cfg.fp32_master_weights else self._dtype)
        if cfg.get("auxiliary_value_coef"):
            model.value_head = ValueHead(model.args["embed_dim"])
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(
                model, auto_wrap_policy={TransformerSelfAttentionLayer}
            )
        if cfg.fp32_master_weights:
            shard_model(model, mesh, compute_dtype=self._dtype)
        return model.train()

    def _make_reference(self, args: dict) -> MTPTransformer:
        model = mtp_llama2(**args)
        cast_parameters_(model, self._dtype)
        return model.eval().requires_grad_(False)

    def _make_batch(self) -> dict[str, torch.Tensor]:
        B, T = self._cfg.batch_size, self._cfg.tokenizer.max_seq_len
        names = ("tokens", "doc", "input_pos", "row")
        integers = {name: torch.zeros(B, T, dtype=torch.int64) for name in names}
        marks = {name: torch.zeros(B, T, dtype=torch.bool) for name in ("keep", "noise")}
        # One number per token: reference losses, or values, which come with rewards.
        scores = {"scores": torch.zeros(B, T), "reward": torch.zeros(B, T)}
        return integers | marks | scores

    def estimate(self) -> Estimate:
        # The first step gives the optimizer its state, and DTensor works out once, with tensors of
        # its own, what it then remembers: neither is to count.
        self._make_gradients()
        self._update()
        if self._cfg.gradient_accumulation_steps > 1:
            self._make_gradients()  # the last micro-step meets the gradients of those before
        tracker = self._start_tracker()
        with tracker:
            tracker.where = "forward"
            loss = self._loss()
            tracker.where = "backward"
            loss.backward()
            tracker.where = "optimizer"
            self._update()
        return tracker.estimate()

    def _make_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def _start_tracker(self) -> _ShardedTracker | _WholeTracker:
        kept = list(self._batch.values())
        if self._reference is not None:
            kept += [*self._reference.parameters(), *self._reference.buffers()]
        if self._cfg.fp32_master_weights:
            tracker = _ShardedTracker(self._model, self._optimizer)
            tracker.track_inputs(tuple(kept))
        else:
            tracker = _WholeTracker()
            tracker.track_external(self._model, self._optimizer, *kept)
        return tracker

    def _loss(self) -> torch.Tensor:
        batch, K = self._batch, self._model.n_future_tokens
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        alphas_K = head_alphas(K, self._weighting.decay)
        inputs = {"mask": self._attention_mask(), "input_pos": batch["input_pos"]}
        scores = self._scores(inputs)
        with_values = bool(self._cfg.get("auxiliary_value_coef"))

        if self._weighting.needs_losses:
            out = self._forward(labels_BTK, with_values=with_values, **inputs)
            losses_BTK = out[0]
            weights_BTK, _ = self._weighting(losses_BTK, mask_BTK, batch["doc"], scores, step=0)
            loss = (alphas_K * weights_BTK * losses_BTK).sum()
        else:
            weights_BTK, _ = self._weighting(None, mask_BTK, batch["doc"], scores, step=0)
            weights_BTK = alphas_K * weights_BTK
            out = self._forward(
                labels_BTK, token_weights_BTK=weights_BTK, with_values=with_values, **inputs
            )
            loss = out[0]
        if with_values:
            y_BT = response_mask(batch["keep"], batch["doc"])
            loss = loss + regression_loss(out[-1], batch["reward"], y_BT)
        return loss

    def _forward(self, labels_BTK: torch.Tensor, **inputs) -> tuple[torch.Tensor, ...]:
        out = self._model(self._batch["tokens"], labels_BTK, **inputs)
        return out if isinstance(out, tuple) else (out,)

    def _attention_mask(self) -> torch.Tensor | None:
        """Dense on a CPU. On a GPU flex attention has blocks that take next to nothing."""
        if self._cfg.device == "cuda":
            return None
        B, T = self._batch["tokens"].shape
        return torch.ones(B, T, T, dtype=torch.bool)

    def _scores(self, inputs: dict) -> torch.Tensor | None:
        if not self._weighting.needs_scores:
            return None
        if "stages" in self._cfg:
            return self._batch["scores"]
        reference = self._batch["scores"]
        if self._reference is not None:
            reference = reference_losses(
                self._reference, self._batch["tokens"], self._batch["doc"], **inputs
            )
        return align_reference(reference, self._model.n_future_tokens)

    def _update(self) -> None:
        training.scale_grads(self._model, torch.ones(()))
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.clip_grad_norm)
        if not self._optimizer_is_compiled or not self._optimizer.state:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
