"""Peak memory of one rank's training step, found by a step of the recipe without any numbers.

The recipe's own ``setup_model`` and ``train`` run, those of a copied and edited recipe too, with
tensors that have a shape and no contents (``FakeTensorMode``) and a process group that moves
nothing; torch's memory tracker adds up what is alive after each operation. No GPU, checkpoint or
data is needed, and almost no memory.

Not included: a GPU's context, libraries and fragmentation, compiled blocks (counted as eager,
which needs more), validation, and the copies that saving makes.

Shapes: B packed rows of a rank's micro-batch, T positions.
"""

import contextlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.dtypes import nf4tensor
from torchtune import config

import wmtp_modules.loss.linear_cross_entropy as loss_module
from wmtp_modules.catalog import RECIPES
from wmtp_modules.checkpoints.read import model_args_from_folder
from wmtp_modules.config.file import merged
from wmtp_modules.config.rules import checkpointing_of, set_checkpointing, what_waits
from wmtp_modules.critic.judge import BATCH_ROWS
from wmtp_modules.critic.states import trunk_states
from wmtp_modules.models.lora import nf4_parameters
from wmtp_modules.models.model_builders import mtp_llama2
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import sharding_mesh
from wmtp_modules.parallel.sharding import DTYPES, cast_parameters_, sync_gradients_
from wmtp_modules.run.figures import Sums

CPU = torch.device("cpu")  # where tensors without contents say they are

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
    """Peak of one rank."""

    peak: int  # bytes of all tensors at that moment
    where: str  # "forward", "backward" or "optimizer"
    parts: dict[str, int]  # bytes by the names of ``PARTS``; together they are the peak


class _Peak:
    """Beside a tracker: keeps the largest total of a run instead of one for each module.

    The trackers look at every module after each operation, which takes as long as the rest.
    """

    where = ""
    peak = 0
    at_peak: tuple[str, dict] = ("", {})
    # Of the trackers.
    _curr_mem_snap: dict
    _track: Callable
    _ref_class: Any

    def _update_peak_stats(self, peak_state: Any) -> None:
        alive = self._curr_mem_snap.get(CPU, {"Total": 0})
        if alive["Total"] > self.peak:
            self.peak, self.at_peak = alive["Total"], (self.where, dict(alive))

    def __torch_dispatch__(self, func, types, args: Any = (), kwargs=None):
        if func is torch.ops.aten.logsumexp.default:
            # Its kernel holds exp(x - max), as large as x, which no tracker sees.
            inside = torch.empty_like(args[0])
            self._track(self._ref_class.ACT, inside)
        return cast(Any, super()).__torch_dispatch__(func, types, args, kwargs)

    def estimate(self) -> Estimate:
        where, alive = self.at_peak
        parts = {part: sum(alive.get(n, 0) for n in names) for part, names in PARTS.items()}
        return Estimate(self.peak, where, parts)


class _ShardedTracker(_Peak, FSDPMemTracker):
    def track_whole(self, parameter: torch.Tensor) -> None:
        """Count a parameter that is not sharded."""
        self._update_and_maybe_create_winfos(parameter, self._ref_class.SHARDED_PARAM)


class _WholeTracker(_Peak, MemTracker):
    pass


def load_recipe(path: str | Path) -> ModuleType:
    """The module of a training recipe, ours or a copy of one.

    Raises:
        ValueError: if the file is not there, fails, or has no class that trains as ours do.
    """
    module = import_recipe(path)
    _recipe_class(module)
    return module


def import_recipe(path: str | Path) -> ModuleType:
    """The module of any recipe; ValueError if the file is not there, or fails."""
    path = Path(path)
    name = f"recipe_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is not a recipe: name a Python file such as recipes/mine.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles look
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any code runs at import
        raise ValueError(f"the recipe {path} cannot be imported: {error!r}") from error
    return module


def recipe_of(cfg: DictConfig) -> Path:
    """The recipe of this repository that a config is for."""
    name = "critic_wmtp_distributed.py" if "stages" in cfg else "rho1_wmtp_distributed.py"
    return RECIPES / name


def _recipe_class(module: ModuleType) -> type:
    for _, found in inspect.getmembers(module, inspect.isclass):
        parts = ("setup_model", "_loss_step", "train")
        if found.__module__ == module.__name__ and all(hasattr(found, part) for part in parts):
            return found
    raise ValueError(
        f"{module.__file__} has no class with setup_model, _loss_step and train, which the "
        "estimate runs: keep these names in a copied recipe"
    )


def estimate_step(cfg: DictConfig, ranks: int, recipe: ModuleType) -> Estimate:
    """Peak memory of one rank in a step after the first, when the optimizer has its state.

    Of the critic's recipe it is the policy stage that is estimated; ``activation_checkpointing:
    auto``, which is chosen by estimates, counts as none.

    Raises:
        ValueError: if an online reference's folder is not there: its size is read from it.
    """
    reference_args = _online_reference_args(cfg, recipe)  # before the fake mode: it reads files
    _make_tables(cfg)
    on_gpu, B, T = cfg.device == "cuda", cfg.batch_size, cfg.tokenizer.max_seq_len
    chunk = loss_module.CHUNK_LOGITS_CUDA if on_gpu else loss_module.CHUNK_LOGITS_CPU
    cfg = merged(cfg, {"model": cast(dict, OmegaConf.to_container(cfg.model, resolve=True))})
    two_steps = {"checkpointer": None, "compile": False, "max_steps": 2, "num_warmup_steps": 0}
    cfg = merged(cfg, two_steps)
    if checkpointing_of(cfg) == "auto":
        cfg = merged(cfg, set_checkpointing("none"))

    def make_mask(doc_BT: object) -> torch.Tensor | None:
        # Dense on a CPU. On a GPU flex attention has blocks that take next to nothing.
        return None if on_gpu else torch.ones(B, T, T, dtype=torch.bool)

    with (
        _fake_world(ranks, cfg.get("data_parallel_shard")) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(loss_module, "CHUNK_LOGITS_CPU", chunk),
        mock.patch.object(loss_module, "_gives_fp32", return_value=on_gpu),
        mock.patch.object(nf4tensor, "CHUNK_SIZE", 2**62),  # quantises nothing in many pieces
        mock.patch.object(recipe, "Watchdog", mock.MagicMock(), create=True),
        mock.patch.object(recipe, "document_mask", make_mask, create=True),
    ):
        one = _recipe_class(recipe)(cfg, CPU, mesh, None)
        one.setup_model()
        if on_gpu:  # what torch.optim would choose there; on a CPU it goes through one by one
            for group in one._optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
        if reference_args:
            one._reference_model = mtp_llama2(**reference_args).eval().requires_grad_(False)
            cast_parameters_(one._reference_model, DTYPES[cfg.dtype])
        rehearsal = Rehearsal(cfg, one)
        one._run, one._loss_step = rehearsal, rehearsal.loss_step
        one.train()
        return rehearsal.tracker.estimate()


class Rehearsal:
    """Stands in for ``Run`` under a recipe's ``train``: two steps, the second of them tracked.

    The first gives the optimizer its state, and DTensor works out once, with tensors of its own,
    what it then remembers: neither should count. ``recipe`` is after ``setup_model``.
    """

    def __init__(self, cfg: DictConfig, recipe: Any) -> None:
        self._cfg = cfg
        self._model: MTPTransformer = recipe._model
        self._optimizer: torch.optim.Optimizer = recipe._optimizer
        self._loss_step: Callable[[dict], tuple] = recipe._loss_step
        self._batch = _make_batch(cfg)
        self._reference = getattr(recipe, "_reference_model", None)
        self.world = dist.get_world_size()
        self.step = self.micro_step = 0
        scale_K = [1.0] * self._model.n_future_tokens
        scale = {"floor": 0.0, "statistics": [0.0, 1.0], "scale_K": scale_K}
        self.kept = {"scale": scale}
        is_sharded = cfg.fp32_master_weights
        self.tracker: _ShardedTracker | _WholeTracker = (
            _ShardedTracker(self._model, self._optimizer) if is_sharded else _WholeTracker()
        )

    def start_steps(self) -> None: ...

    def finish_steps(self) -> None: ...

    def micro_batches(self) -> Iterator[dict]:
        """The last micro-batch of a step; it meets the gradients of those before.

        Where gradients wait for it unsharded, one before it makes them.
        """
        waits = what_waits(self._cfg, self.world)
        if self.step == 1:
            if waits == "nothing" and self._cfg.gradient_accumulation_steps > 1:
                for parameter in self._model.parameters():
                    parameter.grad = (
                        torch.zeros_like(parameter) if parameter.requires_grad else None
                    )
            kept = [value for value in self._batch.values() if torch.is_tensor(value)]
            if self._reference is not None:
                kept += [*self._reference.parameters(), *self._reference.buffers()]
            if isinstance(self.tracker, _ShardedTracker):
                self.tracker.track_inputs(tuple(kept))
                for parameter in nf4_parameters(self._model):  # FSDP2 does not know them
                    self.tracker.track_whole(parameter)
            else:
                self.tracker.track_external(self._model, self._optimizer, *kept)
            self.tracker.__enter__()
        for now in (True,) if waits == "nothing" else (False, True):
            sync_gradients_(self._model, waits, now)
            if self.step == 1 and isinstance(self.tracker, _ShardedTracker):
                self.tracker.reset_mod_stats()  # it takes one forward only
            self.tracker.where = "forward"
            yield self._batch

    def loss_step(self, batch: dict) -> tuple:
        """The recipe's own; what follows it is the backward."""
        result = self._loss_step(batch)
        self.tracker.where = "backward"
        return result

    def new_sums(self) -> Sums:
        return _TellingSums(self.tracker)

    def update(self, sums: Sums, norms: torch.Tensor) -> None:
        if self.may_update(sums, norms):
            self._optimizer.step()

    def may_update(self, sums: Sums, grad_norm: torch.Tensor) -> bool:
        # torchao compiles its step, one kernel for each parameter and no tensors between; taken
        # eagerly it would seem to need many. So only the step that makes the state is taken.
        is_compiled = type(self._optimizer).__module__.startswith("torchao.")
        return self.step == 0 or not is_compiled

    def end_step(self, *_: Any) -> None:
        if self.step == 1:
            self.tracker.__exit__(None, None, None)
        self.step += 1


class _TellingSums(Sums):
    """Tells the tracker that what follows the reduction is the update."""

    def __init__(self, tracker: "_ShardedTracker | _WholeTracker") -> None:
        super().__init__()
        self._tracker = tracker

    def all_reduced(self) -> Sums:
        self._tracker.where = "optimizer"
        return self


def estimate_trunk(cfg: DictConfig) -> Estimate:
    """Peak memory of the critic's stages before the policy, at most: rows may be shorter than T.

    Each rank holds the frozen model whole and computes values of a batch of rows without gradient;
    a step of the value head needs less than that.
    """
    pairs = 2 if cfg.critic.get("objective") == "pairs" else 1
    rows = max(BATCH_ROWS, pairs * cfg.critic.batch_size)
    tokens_BT = torch.zeros(rows, cfg.tokenizer.max_seq_len, dtype=torch.int64)
    with _fake_world(1), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = config.instantiate(cfg.model).eval()
        cast_parameters_(model, DTYPES[cfg.dtype])
        head = ValueHead(model.args["embed_dim"], "turn")
        tracker = _WholeTracker()
        tracker.where = "forward"
        tracker.track_external(model, head)
        with tracker:
            head(*trunk_states(model, tokens_BT), torch.ones_like(tokens_BT, dtype=torch.bool))
    return tracker.estimate()


def _make_tables(cfg: DictConfig) -> None:
    """Have an optimizer of few bits compute the tables it keeps, which takes real numbers."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=DTYPES[cfg.dtype]))
    parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        config.instantiate(cfg.optimizer, [parameter]).step()


@contextlib.contextmanager
def _fake_world(ranks: int, data_parallel_shard: int | None = None) -> Iterator[DeviceMesh]:
    """The mesh of a process group that says it has so many ranks and moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            mesh = init_device_mesh("cpu", (ranks,))
            sharding_mesh(mesh, data_parallel_shard)  # kept; made of tensors that have contents
            yield mesh
    finally:
        dist.destroy_process_group()


def _online_reference_args(cfg: DictConfig, recipe: ModuleType) -> dict | None:
    reference = cfg.get("reference")
    if not reference or reference.mode != "online" or not recipe.make_weighting(cfg).needs_scores:
        return None
    folder = reference.checkpointer.checkpoint_dir
    return model_args_from_folder(folder, max_seq_len=cfg.tokenizer.max_seq_len)


def _make_batch(cfg: DictConfig) -> dict[str, Any]:
    """What a loader of either recipe gives."""
    B, T = cfg.batch_size, cfg.tokenizer.max_seq_len
    names = ("tokens", "doc", "input_pos", "row")
    integers = {name: torch.zeros(B, T, dtype=torch.int64) for name in names}
    marks = {name: torch.zeros(B, T, dtype=torch.bool) for name in ("keep", "noise")}
    numbers = {name: torch.zeros(B, T) for name in ("reference", "values", "reward", "weight")}
    return integers | marks | numbers
