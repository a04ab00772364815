"""Exactness, training step, loss and decoding at the 7B shape on one data-centre GPU, in 9 minutes.

    python3 benchmarks/gpu.py

Every row is printed, and written to ``--out`` as a line of JSON, as soon as it is there; one that
fails says why, and the others go on. Rows stand in the order of their worth, and what the time does
not allow is skipped. At the end the tables follow in markdown. Needs this package and torch.

The training step is the recipe's own: its class sets up configs/rho1/7b_single_gpu.yaml with random
weights, and its ``train`` runs on synthetic responses, a third of each a prompt. MFU is that of
tokens that are not padding, with 6 N + 12 L H Q T operations a token: N parameters that are
multiplied, the output layer K times, L blocks of H heads of width Q. Recomputation does not count,
attention counts in full, neither halved for its causal mask nor cut at documents. The estimate is
``wmtp_modules.estimate_memory``'s.

``--tiny`` runs all rows at small shapes on a CPU; its figures mean nothing.

Shapes: B rows, T positions, K heads, D model width, V vocabulary, N rows of the loss.
"""

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Parameters are filled on one device; norms have a bf16 scale beside fp32 activations on purpose.
for told in ("DTensor random operators may not", "Mismatch dtype between"):
    warnings.filterwarnings("ignore", message=told)
K = 4
# Dense bf16 operations and bytes of memory a second, from the vendor's data sheets.
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12)}
RIGHT = 0.912  # of the draft's guesses: 1 + p + p^2 + p^3 = 3.5 tokens a forward
GIB = 2**30
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Sizes:
    device: str
    model: dict[str, int]  # arguments of ``mtp_llama2`` beside the heads and the length
    batches: dict[int, tuple[int, int]]  # rows and positions by the T of a row's name
    mean_row: int  # tokens of a response with its prompt
    loss: tuple[int, int, int]  # N, D, V
    exact: tuple[int, int, int]  # the same, for fp64
    prompt: int
    new_tokens: int
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)  # of the config
    dtype: torch.dtype = torch.bfloat16  # of decoding


SEVEN_B = Sizes(
    device="cuda",
    model={"vocab_size": 32_000, "num_layers": 32, "num_heads": 32, "embed_dim": 4096},
    batches={4096: (2, 4096), 2048: (4, 2048)},
    mean_row=1111,
    loss=(8192, 4096, 32_000),
    exact=(1024, 4096, 32_000),
    prompt=128,
    new_tokens=65,
    steps=6,
)
TINY = Sizes(
    device="cpu",
    model={"vocab_size": 512, "num_layers": 6, "num_heads": 2, "embed_dim": 64},
    batches={4096: (2, 64), 2048: (4, 32)},
    mean_row=20,
    loss=(64, 32, 512),
    exact=(64, 32, 512),
    prompt=8,
    new_tokens=9,
    steps=2,
    # torchao's optimizer compiles its step, which takes longer than all the rest.
    changes={"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}},
)


# ------------------------------------------------------------------------------- rows and tables


@dataclass(frozen=True)
class Table:
    title: str
    says: str
    columns: tuple[str, ...]


def markdown(table: Table, rows: Iterable[tuple[str, dict]], level: int = 3) -> str:
    """A table whose rows are a name and figures by column; a row may say why it has none."""
    lines = [f"| {' | '.join(('', *table.columns))} |", f"|{'---|' * (1 + len(table.columns))}"]
    for name, figures in rows:
        cells = [str(figures.get(column, "")) for column in table.columns]
        if "failed" in figures:
            cells[0] = f"failed: {figures['failed']}".replace("|", "/")
        lines.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join([f"{'#' * level} {table.title}", "", table.says, "", *lines, ""])


def why(error: BaseException) -> str:
    """An error in one line, with the line of code where it arose."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(at.filename).name}:{at.lineno})"


def spread(values: list[float], digits: int = 2) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(of: list[float], to: list[float]) -> str:
    """Of pairs."""
    return "1" if of is to else spread([a / b for a, b in zip(of, to, strict=True)])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, as soon as Python has the word again."""

    def stop(*_) -> None:
        raise TimeoutError("out of time")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def hardware(device: str) -> str:
    """The line on top of the results."""
    what = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{date.today()}  {what}, {versions}"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(device: str, work: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for i in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if i >= 2:
            taken.append(1000 * (time.perf_counter() - started))
    return taken


# ------------------------------------------------------------------------------------- exactness


def errors(ours: Callable, plain: Callable, tensors: list[torch.Tensor], limit: float) -> dict:
    """Result and gradients of ``ours`` in bf16 against ``plain`` of the same numbers, widened.

    Both take the tensors and return one; the gradients are of its sum, weighted at random.
    """

    def run(function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]
        result = function(*leaves)
        outer = torch.rand(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
        return [result.detach(), *torch.autograd.grad((result * outer).sum(), leaves)]

    figures, worst = {}, 0.0
    got = run(ours, torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        want = run(plain, dtype)
        off, *gradients_off = (
            float((a.to(b) - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)
        )
        largest = float((got[0].to(want[0]) - want[0]).abs().max())
        bits = torch.finfo(dtype).bits
        figures[f"result, fp{bits}"] = f"{off:.1e}, at most {largest:.1e}"
        figures[f"gradients, fp{bits}"] = ", ".join(f"{x:.1e}" for x in gradients_off)
        worst = max(worst, off)
    return figures | {"within": f"{limit:.0e} {'yes' if worst <= limit else 'NO'}"}


def exact_loss(sizes: Sizes, folds: bool, impl: str) -> dict:
    from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy

    N, D, V = sizes.exact
    torch.manual_seed(0)
    labels = torch.randint(V, (N,), device=sizes.device)
    labels[::3] = -100
    weights = torch.rand(N, device=sizes.device) * 2

    def ours(hidden, weight):
        if folds:
            return linear_cross_entropy(hidden, weight, labels, weights, impl=impl)[0] / N
        return linear_cross_entropy(hidden, weight, labels, impl=impl)

    def plain(hidden, weight):
        losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
        return (losses * weights.to(losses)).sum() / N if folds else losses

    made = {"device": sizes.device}
    tensors = [torch.randn(N, D, **made), torch.randn(V, D, **made) * 2 / D**0.5]
    return errors(ours, plain, [tensor.bfloat16() for tensor in tensors], 1e-5)


def exact_logits(sizes: Sizes) -> dict:
    from wmtp_modules.loss.linear_cross_entropy import linear_logits

    N, D, V = sizes.exact
    torch.manual_seed(0)
    tensors = [torch.randn(N, D), torch.randn(V, D) / D**0.5]
    tensors = [tensor.to(sizes.device, torch.bfloat16) for tensor in tensors]
    return errors(linear_logits, lambda h, w: h @ w.t(), tensors, 1e-5)


def exact_attention(sizes: Sizes) -> dict:
    """The call that the blocks make, with the mask of the recipe, against a softmax written out."""
    from torchtune.modules.attention_utils import _sdpa_or_flex_attention

    from wmtp_modules.models.attention_mask import document_mask

    B, T = 2, sizes.batches[4096][1] // 4
    H, Q = sizes.model["num_heads"], sizes.model["embed_dim"] // sizes.model["num_heads"]
    at = torch.arange(T, device=sizes.device)
    doc_BT = torch.stack([at // (T // 3), (at >= T // 5) + (at >= T // 2).long()])
    seen = (doc_BT[:, :, None] == doc_BT[:, None, :]) & (at[:, None] >= at)

    def plain(q, k, v):
        scores = (q @ k.mT / Q**0.5).masked_fill(~seen[:, None], -torch.inf)
        return scores.softmax(-1) @ v

    ours = partial(
        _sdpa_or_flex_attention(), mask=document_mask(doc_BT), dropout_p=0.0, is_causal=False
    )
    torch.manual_seed(0)
    tensors = [torch.randn(B, H, T, Q).to(sizes.device, torch.bfloat16) for _ in range(3)]
    return errors(ours, plain, tensors, 1e-2)


def exact_rope(sizes: Sizes) -> dict:
    """Positions count from 0 in each document; the plain one turns pairs as complex numbers."""
    from torchtune.modules import RotaryPositionalEmbeddings

    T, H = sizes.batches[4096][1], sizes.model["num_heads"]
    Q = sizes.model["embed_dim"] // H
    rope = RotaryPositionalEmbeddings(Q, T).to(sizes.device)
    position_BT = torch.cat([torch.arange(T // 4), torch.arange(T - T // 4)])[None].to(sizes.device)
    turn = 10_000.0 ** (-torch.arange(0, Q, 2, dtype=torch.float64, device=sizes.device) / Q)
    angles = position_BT[..., None, None] * turn

    def plain(x):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    torch.manual_seed(0)
    x = torch.randn(1, T, H, Q).to(sizes.device, torch.bfloat16)
    return errors(lambda x: rope(x, input_pos=position_BT), plain, [x], 1e-2)


# --------------------------------------------------------------------------------- training step


class Steps:
    """Stands in for ``Run`` under a recipe's ``train``: batches made beforehand, times of steps.

    ``train`` ends when ``until`` steps are done and may be called again. Of the last step of a
    counting call the waits of host for device are counted.
    """

    micro_step = 0

    def __init__(self, recipe: Any, batches: list[dict], device: str) -> None:
        self.recipe, self._batches, self._device = recipe, batches, device
        scale = {"floor": 0.0, "statistics": [0.0, 1.0], "scale_K": [1.0] * K}
        self.kept = {"scale": scale}
        self.step, self.loss, self.waits, self._counting = 0, 0.0, {}, False
        self.world = dist.get_world_size()
        recipe._run = self

    def take(self, n: int, *, counting: bool = False) -> list[float]:
        """Milliseconds of each of n steps, from the end of the one before."""
        # What the schedule has of the run's length is settled; only ``train`` reads it now.
        self.recipe._cfg.max_steps = self.step + n
        self._counting, self._marks = counting, [self._mark()]
        self.recipe.train()
        synchronize(self._device)
        if self._device == "cuda":
            pairs = zip(self._marks, self._marks[1:], strict=False)
            return [start.elapsed_time(end) for start, end in pairs]
        return [1000 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def _count(self, part: str) -> Iterator[None]:
        if not self._counting or self._device != "cuda":
            yield
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.waits[part] = sum("synchronizing" in str(one.message) for one in caught)

    def start_steps(self) -> None: ...

    def finish_steps(self) -> None: ...

    def micro_batches(self) -> Iterator[dict]:
        with self._count("micro-batch"):
            yield self._batches[self.step % len(self._batches)]
        self._update = ExitStack()
        self._update.enter_context(self._count("update"))

    def new_sums(self) -> Any:
        from wmtp_modules.run.figures import Sums

        return Sums()

    def update(self, sums: Any, norms: torch.Tensor) -> None:
        """As a run: on the device where the optimizer can, and the host looks once."""
        from wmtp_modules.run.run import Run

        self._optimizer = self.recipe._optimizer
        Run.update(self, sums, norms)

    def may_update(self, sums: Any, norms: torch.Tensor) -> bool:
        self._sums = type(sums)(sums, norms=norms.reshape(-1)).on_host()
        return bool(self._sums["norms"].isfinite().all())

    def end_step(self, *_: Any) -> None:
        self._update.close()
        self._marks.append(self._mark())
        self.step += 1

    def mean_loss(self) -> float:
        return float(self._sums["loss_K"].sum() / self._sums["n_K"].sum())


def step_config(
    sizes: Sizes,
    *,
    T: int,
    checkpointing: str,
    compiled: bool,
    heads: int = K,
    weighting: str = "rho1",
    config: str = "rho1/7b_single_gpu",
    float8: str | None = None,
    **_: Any,
) -> Any:
    """A shipped config with a model, rows and a length of ours."""
    from omegaconf import OmegaConf

    cfg, (B, T) = OmegaConf.load(ROOT / "configs" / f"{config}.yaml"), sizes.batches[T]
    model = {"_component_": "wmtp_modules.models.mtp_llama2", "n_future_tokens": heads}
    model |= {"num_kv_heads": sizes.model["num_heads"], "max_seq_len": T, **sizes.model}
    ours = {
        "model": model,
        "device": sizes.device,
        "tokenizer": {"max_seq_len": T},
        "batch_size": B,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": checkpointing,
        "compile": compiled,
        "float8": float8,
        "weighting": {"name": weighting},
        "max_steps": 1000,
        "num_warmup_steps": 0,
    }
    for key in ("model", *sizes.changes):  # replaced, not merged
        cfg.pop(key, None)
    return OmegaConf.merge(cfg, ours, sizes.changes)


def batches_of(sizes: Sizes, B: int, T: int, *, packed: bool, n: int = 4) -> list[dict]:
    """As a loader gives them; a row that is not packed is padded to T."""
    import datasets
    import numpy as np

    from wmtp_modules.data.loader import to_device
    from wmtp_modules.data.packing import PackedDataset, collate

    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(sizes.mean_row) - 0.18, 0.6, 400).clip(8, T).astype(int)
    rows = datasets.Dataset.from_dict(
        {
            "tokens": [rng.integers(3, sizes.model["vocab_size"], x).tolist() for x in lengths],
            "keep": [[i >= x // 3 for i in range(x)] for x in lengths],
        }
    )
    scores = {"reference": [rng.random((x, K), np.float32) * 8 for x in lengths]}
    scores["values"] = [rng.random(x, np.float32) for x in lengths]
    made = {"max_seq_len": T, "seed": 0}
    packs = PackedDataset(rows, scores=scores, rewards=np.ones(len(rows), np.float32), **made)
    if not packed:
        packs = [
            PackedDataset(
                rows.select([i]),
                scores={name: [values[i]] for name, values in scores.items()},
                rewards=np.ones(1, np.float32),
                **made,
            )[0]
            for i in range(n * B)
        ]
    device = torch.device(sizes.device)
    taken = [packs[i] for i in range(n * B)]
    return [to_device(collate(taken[i * B : (i + 1) * B]), device) for i in range(n)]


@contextmanager
def mesh_of(device: str, rank: int = 0, world: int = 1, store: Any = None) -> Iterator[Any]:
    """A process group; of one process unless the others share the store."""
    from torch.distributed.device_mesh import init_device_mesh

    backend = "nccl" if device == "cuda" else "gloo"
    store = store or dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield init_device_mesh(device, (world,))
    finally:
        dist.destroy_process_group()


def fill(model: Any, _folder: object, *, device: Any) -> None:
    """Random weights in the place of a checkpoint's, made on the device."""
    from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.scale.fill_(1.0)
            if isinstance(module, RotaryPositionalEmbeddings):
                with torch.device(device):
                    module.rope_init()


def recipe_steps(cfg: Any, batches: list[dict], mesh: Any) -> Steps:
    """The recipe that the config is for, set up with random weights and ready to take steps."""
    import wmtp_modules.run.model as run_model
    from wmtp_modules.memory.step import load_recipe, recipe_of

    module = load_recipe(recipe_of(cfg))
    found = [x for name, x in vars(module).items() if name.endswith("WMTPRecipeDistributed")]
    with (
        mock.patch.object(module, "Watchdog", mock.MagicMock()),
        mock.patch.object(run_model, "load_into", fill),
    ):
        recipe = found[0](cfg, torch.device(cfg.device), mesh, None)
        recipe.setup_model()
    return Steps(recipe, batches, cfg.device)


def operations_per_token(model: Any, T: int) -> int:
    """6 N + 12 L H Q T, with the output layer K times; a token is multiplied by no embedding."""
    blocks = [*model.layers, *model.heads]
    output = model.output.proj.weight.numel() * len(model.heads)
    N = output + sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    return 6 * N + 12 * len(blocks) * model.args["embed_dim"] * T


def device_time(steps: Steps) -> dict[str, str]:
    """Kernels of a step, and the share of the time from first to last in which none ran."""
    from torch.autograd import DeviceType

    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            steps.take(2)
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        )
        busy, reached = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return {
            "kernels": str(len(spans) // 2),
            "idle": f"{1 - busy / (reached - spans[0][0]):.1%}",
        }
    except Exception as error:  # what is measured without a profiler still counts
        return {"idle": why(error)}


def train(sizes: Sizes, *, packed: bool, **what: Any) -> dict:
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    cfg, on_gpu = step_config(sizes, **what), sizes.device == "cuda"
    B, T = sizes.batches[what["T"]]
    batches = batches_of(sizes, B, T, packed=packed)
    if what.get("heads", K) != K:
        batches = [batch | {"reference": batch["reference"][..., :1]} for batch in batches]
    with mesh_of(sizes.device) as mesh:
        steps = recipe_steps(cfg, batches, mesh)
        steps.take(2)  # all that compiles, and the optimizer's state
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = steps.take(sizes.steps)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        tokens = sum(int((b["doc"] >= 0).sum()) for b in batches) / len(batches)
        steps.take(1, counting=True)
        per_s = 1000 * tokens / median(taken)
        work = per_s * operations_per_token(steps.recipe._model, T)
        figures = {
            "step, ms": spread(taken, 0),
            "tokens/s": f"{per_s:.0f}",
            "MFU": f"{work / peak_of(sizes.device)[0]:.1%}",
            "padding": f"{1 - tokens / batches[0]['doc'].numel():.1%}",
            "peak, GiB": f"{peak / GIB:.1f}" if on_gpu else NOT_MEASURED,
            "graphs": dynamo.counters["stats"]["unique_graphs"],
            "waits": ", ".join(f"{n} ({part})" for part, n in steps.waits.items()) or NOT_MEASURED,
            "loss": f"{steps.mean_loss():.4f}",
            "_ms": median(taken),
        }
        return figures | (device_time(steps) if on_gpu else {})


def peak_of(device: str) -> tuple[float, float]:
    """Operations and bytes a second; those of an H200 for what is not in the list."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for key, peak in PEAKS.items() if key in name), PEAKS["H200"])


def estimate_beside(what: dict, tiny: bool) -> str:
    """The memory estimate, by a process of its own beside the measurements: it needs no GPU."""
    command = [sys.executable, __file__, "--estimate", json.dumps(what), *["--tiny"] * tiny]
    own = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"


def estimate(sizes: Sizes, what: dict) -> str:
    from wmtp_modules.memory.step import estimate_step, load_recipe, recipe_of

    # A step of compiled blocks is counted as an eager one.
    cfg = step_config(sizes, **what)
    cfg.device = "cuda"
    return f"{estimate_step(cfg, 1, load_recipe(recipe_of(cfg))).peak / GIB:.1f}"


# ------------------------------------------------------------------------------------------ loss


def time_loss(sizes: Sizes, folds: bool, impl: str) -> dict:
    """Forward and backward of one head's loss beside the products that it takes, in bf16."""
    from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy

    N, D, V = sizes.loss
    made = {"device": sizes.device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    hidden = torch.randn(N, D, **made).requires_grad_()
    weight = (torch.randn(V, D, **made) * 2 / D**0.5).requires_grad_()
    labels = torch.randint(V, (N,), device=sizes.device)
    weights = torch.rand(N, device=sizes.device)
    grad = torch.randn(N, V, **made)

    def ours():
        hidden.grad = weight.grad = None
        if impl == "torch":
            how = {"options": torch.nn.LinearCrossEntropyOptions(), "reduction": "none"}
            losses = F.linear_cross_entropy(hidden, weight, labels, **how)
            (losses * weights).sum().backward()
        elif folds:
            linear_cross_entropy(hidden, weight, labels, weights, impl=impl)[0].backward()
        else:
            (linear_cross_entropy(hidden, weight, labels, impl=impl) * weights).sum().backward()

    @torch.no_grad()
    def products():
        for _ in range(1 if folds else 2):  # logits, and once more where they are recomputed
            hidden @ weight.t()
        grad @ weight
        grad.t() @ hidden

    repeats = 10 if sizes.device == "cuda" else 3
    taken, least = [], []
    for _ in range(3):  # by turns
        taken += milliseconds(sizes.device, ours, repeats)
        least += milliseconds(sizes.device, products, repeats)
    return {
        "ms": spread(taken),
        "its products, ms": spread(least),
        "ratio": f"{median(taken) / median(least):.2f}",
    }


# -------------------------------------------------------------------------------------- decoding


class Decoding:
    """A model of random weights, made once for all rows, and prompts for it."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._made = sizes, None

    def close(self) -> None:
        self._made = None

    def _make(self) -> tuple[Any, Any]:
        from torchtune.models.llama2 import Llama2Tokenizer

        from wmtp_modules.models import mtp_llama2
        from wmtp_modules.parallel.sharding import cast_parameters_
        from wmtp_modules.quickstarts.stdlib import train_tokenizer

        sizes = self._sizes
        longest = sizes.prompt + sizes.new_tokens
        with torch.device("meta"):
            args = {**sizes.model, "num_kv_heads": sizes.model["num_heads"]}
            model = mtp_llama2(n_future_tokens=K, max_seq_len=longest, **args)
        cast_parameters_(model, sizes.dtype)
        fill(model, None, device=sizes.device)
        with TemporaryDirectory() as folder:  # the text of a completion is part of decoding
            train_tokenizer(Path(folder), [Path(__file__).read_text()] * 4, 400)
            return model.eval(), Llama2Tokenizer(f"{folder}/tokenizer.model")

    def measure(self, decoding: str, batch_size: int, **settings: Any) -> dict:
        """Forwards beside the time that their bytes take."""
        how, device = {"decoding": decoding, "batch_size": batch_size}, self._sizes.device
        self.once(**how, **settings)
        spent = [self.once(**how, **settings) for _ in range(5 if device == "cuda" else 2)]
        forwards, per_s, per_row = map(list, zip(*spent, strict=True))
        bound = 1000 * self._bytes_of_forward(decoding, batch_size) / peak_of(device)[1]
        return {
            "forward, ms": spread(forwards),
            "bandwidth bound, ms": f"{bound:.2f}",
            "of the bound": f"{bound / median(forwards):.0%}",
            "tokens/forward": f"{median(per_row):.2f}",
            "tokens/s": f"{median(per_s):.0f}",
            "_per_s": median(per_s),
        }

    def once(self, decoding: str, batch_size: int, **settings: Any) -> tuple[float, float, float]:
        """Milliseconds of a forward, tokens/s, and tokens of a row a forward, without prefill.

        That is what completions take, less what those of one token do. Random weights agree on
        nothing, so every draw is replaced by one token, after it is made, and the draft guesses
        that token at the set rate.
        """
        from wmtp_modules.generation import self_speculative
        from wmtp_modules.generation.generate import Request, generate

        if self._made is None:
            self._made = self._make()
        (model, tokenizer), sizes = self._made, self._sizes
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 300, (batch_size, sizes.prompt), generator=rng).tolist()
        requests = [Request(tuple(prompt), seed=0) for prompt in prompts]
        token = tokenizer.encode("a", add_bos=False, add_eos=False)[-1]
        drawn, drafted = self_speculative.draw_tokens, self_speculative.Decoder.draft

        def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
            return drawn(*args, **kwargs) * 0 + token

        def draft(decoder: Any, logits_BKV: torch.Tensor) -> torch.Tensor:
            guesses = drafted(decoder, logits_BKV)
            right = torch.rand(guesses.shape, device=guesses.device) < RIGHT
            return guesses * 0 + torch.where(right, token, token - 1)

        def run(new_tokens: int) -> tuple[float, list]:
            greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": ()}
            greedy |= {"decoding": decoding, "max_new_tokens": new_tokens, "dtype": sizes.dtype}
            greedy |= {"batch_size": batch_size}
            synchronize(sizes.device)
            started = time.perf_counter()
            done = generate(model, tokenizer, requests, **greedy, **settings)
            synchronize(sizes.device)
            return time.perf_counter() - started, done

        with (
            mock.patch.object(self_speculative, "draw_tokens", draw),
            mock.patch.object(self_speculative.Decoder, "draft", draft),
        ):
            prefill, _ = run(1)
            whole, done = run(sizes.new_tokens)
        tokens = sum(len(one.tokens) - 1 for one in done)
        forward = 1000 * (whole - prefill) / max(one.forwards for one in done)
        return forward, tokens / (whole - prefill), tokens / sum(one.forwards for one in done)

    def _bytes_of_forward(self, decoding: str, batch_size: int) -> int:
        """Weights and, half way through the completion, keys and values; each is read once."""
        model, _ = self._made
        used = model.heads if decoding == "self_speculative" else model.heads[:1]
        blocks = [*model.layers, *used]
        weights = sum(p.numel() for block in blocks for p in block.parameters())
        # A second time for the logits of the heads that draft.
        weights += model.output.proj.weight.numel() * (2 if decoding == "self_speculative" else 1)
        positions = self._sizes.prompt + self._sizes.new_tokens // 2
        cached = 2 * len(blocks) * batch_size * positions * model.args["embed_dim"]
        return self._sizes.dtype.itemsize * (weights + cached)


# ---------------------------------------------------------------------------------- all together

TABLES = {
    "exactness": Table(
        "Exactness",
        "Each kernel on bf16 operands against plain torch on the same numbers in fp32 and fp64: "
        "relative error of the result, its largest deviation, relative error of each gradient.",
        ("result, fp32", "gradients, fp32", "result, fp64", "gradients, fp64", "within"),
    ),
    "training": Table(
        "Training step, 7B, four heads",
        "The recipe's own step with configs/rho1/7b_single_gpu.yaml (pure bf16, 8-bit AdamW) but "
        "for what a row says, without validation and logs. Tokens and MFU leave out "
        "padding; MFU is of 6 N + 12 L H Q T operations a token, attention not halved. Waits are "
        "the host's for the device. Ratio: the first row's step over this one's. Goals: 52 % MFU "
        "at T 4096, 1 % idle, 1.06 times the step of one head.",
        (
            *("step, ms", "tokens/s", "MFU", "padding", "peak, GiB", "estimate, GiB"),
            *("graphs", "kernels", "waits", "idle", "loss", "ratio"),
        ),
    ),
    "loss": Table(
        "Loss of one head",
        "8192 rows, D 4096, V 32000, bf16: forward and backward beside bf16 products of the same "
        "shapes (three with the weights folded in, four without). Goal: 1.15.",
        ("ms", "its products, ms", "ratio"),
    ),
    "decoding": Table(
        "Decoding, 7B, bf16",
        "A forward of a batch beside the time that reading weights, keys and values takes; the "
        f"draft is right at {RIGHT:.1%} of its guesses. Ratio: of tokens/s, self-speculative over "
        "plain decoding. Goals: 70 % of the bound for plain decoding, 3.05 times that at batch 1, "
        "1.5 times at batch 16.",
        (
            *("forward, ms", "bandwidth bound, ms", "of the bound"),
            *("tokens/forward", "tokens/s", "ratio"),
        ),
    ),
}


@dataclass(frozen=True)
class Row:
    table: str
    name: str
    measure: Callable[..., dict]  # of sizes
    what: dict[str, Any]
    against: str | None = None  # the row that a ratio is taken against


def _training_row(T=4096, packed=True, checkpointing="selective", compiled=True, **more) -> Row:
    against = more.pop("against", None)
    told = [f"T {T}", "packed" if packed else "padded", checkpointing]
    told += ["compiled" if compiled else "eager"]
    told += ["one head" if key == "heads" else value for key, value in more.items()]
    what = {"T": T, "packed": packed, "checkpointing": checkpointing, "compiled": compiled, **more}
    return Row("training", ", ".join(told), train, what, against)


def all_rows() -> list[Row]:
    """In the order of their worth."""
    rows = [
        Row("exactness", f"loss, {'folded' if folds else 'per token'}, {impl}", exact_loss, what)
        for folds, impl in product((True, False), ("chunked", "compiled"))
        for what in [{"folds": folds, "impl": impl}]
    ]
    rows += [
        Row("exactness", "logits", exact_logits, {}),
        Row("exactness", "attention, packed", exact_attention, {}),
        Row("exactness", "rotary embedding", exact_rope, {}),
    ]
    first = _training_row()
    rows.append(first)
    decoding = {
        (how, size, static): Row(
            "decoding",
            f"{how}, batch {size}" + ", CUDA graph" * static,
            None,
            {"decoding": how, "batch_size": size, "static_shapes": static},
        )
        for how, size, static in product(("plain", "self_speculative"), (1, 16), (True, False))
    }
    rows += [row for (_, size, _), row in decoding.items() if size == 1]
    for impl, folds in product(("compiled", "chunked"), (True, False)):
        name = f"{'folded' if folds else 'per token'}, {impl}"
        rows.append(Row("loss", name, time_loss, {"folds": folds, "impl": impl}))
    rows.append(Row("loss", "torch's own", time_loss, {"folds": False, "impl": "torch"}))
    rows += [
        _training_row(heads=1, against=first.name),
        _training_row(weighting="uniform", against=first.name),
        _training_row(checkpointing="none"),
        _training_row(packed=False),
        _training_row(checkpointing="full"),
    ]
    rows += [row for (_, size, _), row in decoding.items() if size == 16]
    rows.append(_training_row(checkpointing="full", config="rho1/7b"))
    rows.append(_training_row(float8="rowwise", against=first.name))
    sizes = product((4096, 2048), (True, False), (True, False), ("selective", "none", "full"))
    for T, compiled, packed, checkpointing in sizes:
        row = _training_row(T, packed, checkpointing, compiled)
        rows += [row] * all(row.name != other.name for other in rows)
    return rows


def ratio(row: Row, rows: dict[str, Row], found: dict[str, dict]) -> dict[str, str]:
    """Of a row whose pendant is measured."""
    own = found[row.name]
    if row.table == "training" and "_ms" in found.get(row.against or "", {}):
        value = found[row.against]["_ms"] / own["_ms"]
        return {"ratio": f"{value:.3f}"}
    if row.table == "decoding" and row.what["decoding"] == "self_speculative":
        plain = found.get(row.name.replace("self_speculative", "plain"), {})
        return {"ratio": f"{own['_per_s'] / plain['_per_s']:.2f}"} if "_per_s" in plain else {}
    return {}


def report(found: dict[str, dict]) -> str:
    """All tables in markdown, of figures by row; a row without any is not measured."""
    parts = []
    for key, table in TABLES.items():
        rows = [
            (row.name, found.get(row.name, {table.columns[0]: NOT_MEASURED}))
            for row in all_rows()
            if row.table == key
        ]
        parts.append(markdown(table, rows))
    return "\n".join(parts)


def read_results(path: Path) -> tuple[str, dict[str, dict]]:
    """The first line and the figures by row of what ``main`` wrote; nothing if there is no file."""
    if not path.exists():
        return "", {}
    lines = path.read_text().splitlines()
    found: dict[str, dict] = {}
    for one in (json.loads(line) for line in lines if line.startswith("{")):
        found.setdefault(one.pop("row"), {}).update(one)
    return lines[0], found


def run(sizes: Sizes, rows: list[Row], minutes: float, tell: Callable[[dict], None]) -> dict:
    """Measure rows until the time is over, and tell each; figures by row."""
    end, found = time.monotonic() + 60 * minutes, {}
    by_name, decoding = {row.name: row for row in rows}, Decoding(sizes)
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 4) // 4))
    estimates = {
        row.name: pool.submit(estimate_beside, row.what, sizes is TINY)
        for row in rows
        if row.table == "training"
    }
    for row in rows:
        measure = partial(row.measure, sizes) if row.measure else decoding.measure
        if row.table == "training":
            decoding.close()
        if sizes.device == "cuda":
            torch._dynamo.reset()  # what it has compiled may hold a model
            gc.collect()
            torch.cuda.empty_cache()
        started = time.monotonic()
        try:
            if end - started < 10:
                raise TimeoutError(f"skipped, the {minutes:g} minutes are over")
            with time_limit(end - started):
                found[row.name] = measure(**row.what)
            found[row.name] |= ratio(row, by_name, found)
        except Exception as error:  # any row may fail, and the others go on
            found[row.name] = {"failed": why(error)}
        seconds = round(time.monotonic() - started, 1)
        tell({"table": row.table, "row": row.name, **found[row.name], "s": seconds})
    for name, future in estimates.items():
        if "failed" in found[name] or not (future.done() or future.running()):
            future.cancel()
            continue
        with suppress(subprocess.TimeoutExpired):
            found[name]["estimate, GiB"] = future.result()
            tell({"row": name, "estimate, GiB": future.result()})
    pool.shutdown(cancel_futures=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.txt")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which rows are skipped")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows with one of these in their name"
    )
    parser.add_argument("--rows", action="store_true", help="only name the rows, in their order")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU, to try it")
    parser.add_argument("--estimate", help=argparse.SUPPRESS)  # what a process beside is told
    args = parser.parse_args()
    sizes = TINY if args.tiny else SEVEN_B
    if args.estimate:
        return print(estimate(sizes, json.loads(args.estimate)))
    rows = [r for r in all_rows() if any(word in f"{r.table}: {r.name}" for word in args.only)]
    if args.rows:
        return print("\n".join(f"{row.table}: {row.name}" for row in rows))
    if sizes.device == "cuda" and not torch.cuda.is_available():
        return print(f"torch sees no GPU, so nothing is measured.\n\n{report({})}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as out:

        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=out, flush=True)

        write(hardware(sizes.device))
        write(f"$ python {' '.join(sys.argv)}")
        found = run(sizes, rows, args.minutes, lambda told: write(json.dumps(told)))
        write(f"\n{report(found)}")


if __name__ == "__main__":
    main()
