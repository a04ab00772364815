"""What everything costs on a machine without a GPU; writes docs/performance.md.

    uv run python benchmarks/performance.py
    uv run python benchmarks/performance.py --quick --only loss step
    uv run python benchmarks/performance.py --profile

A quarter of an hour on two quiet cores. Each row is printed as soon as it is there, and one that
fails says why. What is compared is measured by turns in one run, so that ratios hold when the
machine's speed drifts; they are medians of pairs, with quartiles. Only a run of all tables writes
the page. ``--profile`` writes a trace of a training step for chrome://tracing, nothing else.

Shapes: B rows, T positions, K heads, D model width, V vocabulary, N rows of the loss.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import gpu
import performance_data
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from common import PeakAnonymousMemory, hardware
from gpu import GIB, Sizes, Steps, Table, mesh_of, ratios, spread, why
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[tuple[str, dict[str, Any]]]  # a row's name and its figures by column

SMALL = Sizes(
    device="cpu",
    model={"vocab_size": 2048, "num_layers": 13, "num_heads": 8, "embed_dim": 512},
    batches={128: (2, 128)},
    mean_row=48,
    loss=(4096 * 4, 512, 32_000),
    exact=(0, 0, 0),
    prompt=8,
    new_tokens=97,
    steps=1,
    changes={
        "dtype": "fp32",
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True},
    },
    dtype=torch.float32,
)
QUICK = replace(SMALL, model=SMALL.model | {"num_layers": 6, "embed_dim": 128})


def sizes_of(quick: bool) -> Sizes:
    return QUICK if quick else SMALL


def by_turns(
    ways: dict[str, Callable[[], object]], rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(warm_up + rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


# ------------------------------------------------------------------------------------------ loss


def naive(hidden, weight, labels, token_weights):
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, -2), labels.flatten(), reduction="none")
    return (losses.view(labels.shape) * token_weights).sum()


def folded(hidden, weight, labels, token_weights):
    from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, token_weights)[0]


def per_token(hidden, weight, labels, token_weights):
    from wmtp_modules.loss.linear_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(hidden, weight, labels) * token_weights).sum()


def torchs(hidden, weight, labels, token_weights):
    how = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions()}
    losses = F.linear_cross_entropy(hidden.flatten(0, -2), weight, labels.flatten(), **how)
    return (losses.view(labels.shape) * token_weights).sum()


WAYS = {
    "naive joint logits": naive,
    "folded weights": folded,
    "per-token losses": per_token,
    "torch's F.linear_cross_entropy": torchs,
}


def loss_problem(N: int, D: int, V: int, heads: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(N // heads, heads, D, requires_grad=True)
    weight = (torch.randn(V, D) / D**0.5).requires_grad_()
    labels = torch.randint(V, (N // heads, heads))
    return hidden, weight, labels, torch.rand(N // heads, heads) * 2


def loss_step(way: str, hidden, weight, labels, token_weights) -> tuple[torch.Tensor, ...]:
    hidden.grad = weight.grad = None
    WAYS[way](hidden, weight, labels, token_weights).backward()
    return hidden.grad, weight.grad


def loss_size(quick: bool) -> tuple[int, int, int]:
    return (1024, 128, 4000) if quick else SMALL.loss


def loss_peak(way: str, quick: bool) -> int:
    """Bytes of anonymous memory above what was there, in a process that has done a tiny step."""
    loss_step(way, *loss_problem(8, 8, 8))  # loads what the first one loads
    problem = loss_problem(*loss_size(quick))
    with PeakAnonymousMemory() as peak:
        loss_step(way, *problem)
    return peak.bytes


def loss_rows(quick: bool) -> Rows:
    command = [sys.executable, __file__, *["--quick"] * quick, "--peak-of"]
    memory = {way: int(subprocess.check_output([*command, way])) for way in WAYS}
    problem, grads = loss_problem(*loss_size(quick)), {}

    def step(way: str) -> None:
        grads[way] = loss_step(way, *problem)

    seconds = by_turns({way: lambda way=way: step(way) for way in WAYS}, 3, 0)
    first = next(iter(WAYS))
    for way in WAYS:
        off = [
            float((got - want).norm() / want.norm())
            for got, want in zip(grads[way], grads[first], strict=True)
        ]
        yield (
            way,
            {
                "memory, MB": f"{memory[way] / 1e6:.0f}",
                "1 / memory ratio": f"{memory[first] / memory[way]:.1f}",
                "time ratio": ratios(seconds[way], seconds[first]),
                "gradients off by": f"{max(off):.0e}",
            },
        )


# --------------------------------------------------------------------------------- training step


class Variants:
    """Recipes' steps by name, in one process group of one process; a context."""

    def __init__(self, quick: bool) -> None:
        self._sizes, self._stack = sizes_of(quick), ExitStack()
        self.steps: dict[str, Steps] = {}

    def __enter__(self) -> "Variants":
        self._mesh = self._stack.enter_context(mesh_of("cpu"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, name: str, B: int = 2, T: int = 128, **what: Any) -> Any:
        """Set a recipe up; ``model`` are arguments of the model, the rest ``gpu.step_config``'s."""
        model = self._sizes.model | what.pop("model", {})
        sizes = replace(self._sizes, batches={T: (B, T)}, model=model)
        defaults = {"checkpointing": "none", "compiled": False, "config": "rho1/7b"}
        cfg = gpu.step_config(sizes, T=T, **{**defaults, "weighting": "uniform", **what})
        batches = gpu.batches_of(sizes, B, T, packed=True)
        heads = what.get("heads", gpu.K)
        batches = [b | {"reference": b["reference"][..., :heads]} for b in batches]
        self.steps[name] = gpu.recipe_steps(cfg, batches, self._mesh)
        return self.steps[name].recipe

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        ways = {name: lambda one=one: one.take(1) for name, one in self.steps.items()}
        return by_turns(ways, rounds, 2)


def online_reference(quick: bool) -> Any:
    """A reference of a quarter of the size, as a run with ``reference.mode: online`` holds one."""
    from wmtp_modules.models import mtp_llama2

    model = sizes_of(quick).model
    args = model | {"embed_dim": model["embed_dim"] // 2, "num_kv_heads": model["num_heads"]}
    return mtp_llama2(n_future_tokens=4, max_seq_len=128, **args).eval().requires_grad_(False)


def step_rows(quick: bool) -> Rows:
    with Variants(quick) as variants:
        variants.add("four heads, uniform")
        variants.add("one head, uniform", heads=1)
        variants.add("rho1, cached scores", weighting="rho1")
        recipe = variants.add("rho1, online reference", weighting="rho1")
        recipe._reference_model = online_reference(quick)
        variants.add("critic's policy", weighting="critic", config="critic/7b")
        seconds = variants.seconds(3 if quick else 15)
    base = "four heads, uniform"
    for name, own in seconds.items():
        yield (
            name,
            {
                "ms": spread([1000 * s for s in own], 0),
                "ratio to uniform, four heads": ratios(own, seconds[base]),
            },
        )


def growth_rows(quick: bool) -> Rows:
    """What doubling each size costs; 2 is in proportion."""
    N, D, V = (256, 64, 1000) if quick else (4096, 256, 8000)
    problems = {
        "base": loss_problem(N, D, V),
        "T": loss_problem(2 * N, D, V),
        "V": loss_problem(N, D, 2 * V),
        "K": loss_problem(2 * N, D, V, heads=8),
        "rows": loss_problem(2 * N, D, V),
    }
    ways = {
        name: lambda problem=problem: loss_step("folded weights", *problem)
        for name, problem in problems.items()
    }
    loss = by_turns(ways, 3 if quick else 9, 1)
    vocabulary, layers = (sizes_of(quick).model[key] for key in ("vocab_size", "num_layers"))
    with Variants(quick) as variants:
        variants.add("base")
        variants.add("T", T=256)
        variants.add("V", model={"vocab_size": 2 * vocabulary})
        variants.add("K", heads=8, model={"num_layers": layers + 4})
        variants.add("rows", B=4)
        step = variants.seconds(3 if quick else 7)
    for name, told in (
        ("T", "positions: 256 for 128"),
        ("V", f"vocabulary: {2 * vocabulary} for {vocabulary}"),
        ("K", "heads: 8 for 4, on the same trunk"),
        ("rows", "rows: 4 for 2"),
    ):
        yield (
            told,
            {
                "loss, time ratio": ratios(loss[name], loss["base"]),
                "step, time ratio": ratios(step[name], step["base"]),
            },
        )


def checkpointing_rows(quick: bool) -> Rows:
    import memory_estimate
    from omegaconf import OmegaConf

    from wmtp_modules.memory.step import estimate_step, load_recipe, recipe_of

    policies = ("none",) if quick else ("none", "selective", "full")
    with Variants(quick) as variants:
        for policy in policies:
            variants.add(policy, B=4, T=128 if quick else 512, checkpointing=policy)
        seconds = variants.seconds(3 if quick else 5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = memory_estimate.make_assets(folder)
        for policy in policies:
            own = {"activation_checkpointing": policy, "output_dir": str(folder / policy)}
            cfg, file = OmegaConf.merge(base, own), folder / f"{policy}.yaml"
            OmegaConf.save(cfg, file)
            predicted = estimate_step(cfg, 1, load_recipe(recipe_of(cfg))).peak
            peaks = memory_estimate.measure(file, 1, folder / f"{policy}_measured")
            yield (
                policy,
                {
                    "time ratio": ratios(seconds[policy], seconds["none"]),
                    "predicted, GiB": f"{predicted / GIB:.2f}",
                    "measured, GiB": f"{sum(peaks) / len(peaks) / GIB:.2f}",
                },
            )


def rank_worker(rank: int, world: int, folder: str, quick: bool) -> None:
    """One of so many ranks with a thread each: times of steps, and the collectives of one."""
    import fsdp_collectives

    torch.set_num_threads(1)
    sizes = sizes_of(quick)
    store = torch.distributed.FileStore(f"{folder}/store{world}", world)
    what = {"checkpointing": "none", "compiled": False, "weighting": "uniform"}
    with mesh_of("cpu", rank, world, store) as mesh:
        cfg = gpu.step_config(sizes, T=128, config="rho1/7b", **what)
        steps = gpu.recipe_steps(cfg, gpu.batches_of(sizes, 2, 128, packed=True), mesh)
        steps.take(2)
        taken, counts = steps.take(3 if quick else 10), Counter()
        with fsdp_collectives.load_test_module().counted(counts):
            steps.take(1)
        if rank == 0:
            Path(folder, f"{world}.json").write_text(json.dumps([taken, counts]))


def ranks_rows(quick: bool) -> Rows:
    tokens: dict[int, float] = {}
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_worker, args=(world, folder, quick), nprocs=world)
            taken, counts = json.loads(Path(folder, f"{world}.json").read_text())
        tokens[world] = 1000 * world * 2 * 128 / median(taken)
        yield (
            f"{world} rank{'s' * (world > 1)}",
            {
                "ms": spread(taken, 0),
                "tokens/s": f"{tokens[world]:.0f}, {tokens[world] / tokens[1]:.2f} of one rank's",
                "all-gathers": counts.get("all_gather_single", 0),
                "reduce-scatters": counts.get("reduce_scatter_single", 0),
                "units": sizes_of(quick).model["num_layers"] + 2,
            },
        )


def write_profile(path: Path, quick: bool) -> None:
    with quiet(), Variants(quick) as variants:
        variants.add("rho1", weighting="rho1")
        steps = variants.steps["rho1"]
        steps.take(2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            steps.take(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    print(f"The trace of a step is in {path}: open it in chrome://tracing or ui.perfetto.dev.")


# ------------------------------------------------------------------- decoding, and what is around


class CountOperators(TorchDispatchMode):
    """Of a GPU's host each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def operators_of(decoding: gpu.Decoding, how: str, batch_size: int) -> int:
    """Operators of the last forward, which all rows are still part of."""
    from wmtp_modules.generation.self_speculative import Decoder

    counted, forward = [], Decoder._forward

    def counting(decoder: Decoder) -> Any:
        with CountOperators() as operators:
            table = forward(decoder)
        counted.append(operators.n)
        return table

    with mock.patch.object(Decoder, "_forward", counting):
        decoding.once(how, batch_size)
    return counted[-1]


def generation_rows(quick: bool) -> Rows:
    sizes, decodings = sizes_of(quick), ("plain", "self_speculative")
    decoding = gpu.Decoding(replace(sizes, model=sizes.model | {"embed_dim": 128}))
    for batch_size in (1, 4, 16):
        spent: dict[str, list[tuple]] = {how: [] for how in decodings}
        for i in range(3 if quick else 6):
            for how in decodings:
                one = decoding.once(how, batch_size)
                if i:
                    spent[how].append(one)
        forwards, per_s, per_row = (
            {how: [one[i] for one in spent[how]] for how in decodings} for i in range(3)
        )
        plain, fast = decodings
        yield (
            f"batch {batch_size}",
            {
                "plain, tokens/s": f"{median(per_s[plain]):.0f}",
                "self-speculative": f"{median(per_s[fast]):.0f}",
                "ratio": ratios(per_s[fast], per_s[plain]),
                "tokens/forward": f"{median(per_row[fast]):.2f}",
                "time of a forward, ratio": ratios(forwards[fast], forwards[plain]),
                "operators of a forward": " and ".join(
                    str(operators_of(decoding, how, batch_size)) for how in decodings
                ),
            },
        )


def start_up_rows(quick: bool) -> Rows:
    import startup

    recipe, config = startup.RECIPES["rho1"]
    typo = [startup.TUNE, "run", recipe, "--config", config, "learning_rte=3"]
    startup.seconds_of(typo)
    pairs = [
        [startup.seconds_of(command) for command in (startup.HELP, typo)]
        for _ in range(1 if quick else 3)
    ]
    of_help, of_typo = ([pair[i] for pair in pairs] for i in range(2))
    for name, own in (("tune --help", of_help), ("tune run to a config's error", of_typo)):
        used, clock = zip(*own, strict=True)
        yield (
            name,
            {
                "processor, s": spread(list(used)),
                "clock, s": spread(list(clock)),
                "ratio": ratios(list(used), [one[0] for one in of_help]),
            },
        )


def logging_rows(quick: bool) -> Rows:
    import logged_step

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix="wmtp_logged_") as folder:
        stores = {
            "metrics.jsonl alone": None,
            "and MLflow in SQLite": f"sqlite:///{folder}/mlflow.db",
            "and an MLflow server that is away": f"http://127.0.0.1:{logged_step.free_port()}",
        }
        for i, (name, uri) in enumerate(stores.items()):
            own = Path(folder, str(i))
            own.mkdir()
            taken, _ = logged_step.milliseconds(own, uri, 10 if quick else 150)
            rank = quantiles(taken, n=100, method="inclusive")
            yield name, {"ms": spread(taken), "99th percentile": f"{rank[98]:.2f}"}


def sandbox_rows(quick: bool) -> Rows:
    import sandbox

    jobs = sandbox.read_jobs(ROOT / "tests" / "samples" / "humaneval.jsonl")
    jobs = (jobs * 80)[: 20 if quick else 80]
    for tier in ("bubblewrap", "landlock"):
        try:
            with sandbox.Sandbox(tier, workers=2) as room:
                seconds = [sandbox.run_all(room, jobs)[0] for _ in range(4)][1:]
            yield tier, {"programs/s": spread([len(jobs) / s for s in seconds], 0)}
        except sandbox.SandboxError as error:  # this machine does not have it
            yield tier, {"programs/s": " ".join(str(error).split())[:160]}


# ---------------------------------------------------------------------------------- all together


@dataclass(frozen=True)
class Part:
    table: Table
    measure: Callable[[bool], Rows]


PARTS = {
    "loss": Part(
        Table(
            "Loss",
            "Output projection and cross-entropy, forward and backward, N = 4096 x 4 heads, D 512, "
            "V 32000, fp32: the peak of memory in a process of its own, time beside naive logits.",
            ("memory, MB", "1 / memory ratio", "time ratio", "gradients off by"),
        ),
        loss_rows,
    ),
    "step": Part(
        Table(
            "Training step",
            "The recipes' own step, 9 trunk blocks and 4 heads (13 and 1: the same depth) of width "
            "512, 2 x 128 tokens. Uniform and the critic's weights go into the forward, rho1's "
            "come of its losses and cost a matrix product more.",
            ("ms", "ratio to uniform, four heads"),
        ),
        step_rows,
    ),
    "growth": Part(
        Table(
            "Growth",
            "What doubling one size does to the time: of the loss with folded weights (N 4096, "
            "D 256, V 8000) and of the step above.",
            ("loss, time ratio", "step, time ratio"),
        ),
        growth_rows,
    ),
    "checkpointing": Part(
        Table(
            "Activation checkpointing",
            "Time of the step above at 4 x 512 tokens; peak of a smaller one (2 trunk blocks, "
            "V 4000) as predicted and as the kernel says.",
            ("time ratio", "predicted, GiB", "measured, GiB"),
        ),
        checkpointing_rows,
    ),
    "ranks": Part(
        Table(
            "Ranks",
            "The step above on ranks of one thread, each with 2 rows: units are what FSDP gathers "
            "(blocks, output, embedding); trunk blocks are gathered twice, and masks for the joint "
            "weights once.",
            ("ms", "tokens/s", "all-gathers", "reduce-scatters", "units"),
        ),
        ranks_rows,
    ),
    "packing": Part(performance_data.PACKING, performance_data.packing_rows),
    "epoch": Part(performance_data.EPOCH, performance_data.epoch_rows),
    "tokenising": Part(performance_data.TOKENISING, performance_data.tokenising_rows),
    "loading": Part(performance_data.LOADING, performance_data.loading_rows),
    "generation": Part(
        Table(
            "Generation",
            "A model of random weights, width 128, whose draft is right at "
            f"{gpu.RIGHT:.1%} of its guesses: decoding without prefill, both ways by turns. "
            "benchmarks/decode_speed.py has a trained model.",
            (
                *("plain, tokens/s", "self-speculative", "ratio"),
                *("tokens/forward", "time of a forward, ratio", "operators of a forward"),
            ),
        ),
        generation_rows,
    ),
    "start-up": Part(
        Table(
            "Start-up",
            "From the command to the sentence about a mistyped key.",
            ("processor, s", "clock, s", "ratio"),
        ),
        start_up_rows,
    ),
    "logging": Part(
        Table(
            "Logging",
            "What a step waits for its 35 figures.",
            ("ms", "99th percentile"),
        ),
        logging_rows,
    ),
    "sandbox": Part(
        Table("Sandbox", "Small programs with their tests, two workers.", ("programs/s",)),
        sandbox_rows,
    ),
}

HEAD = """# Performance

What [benchmarks/performance.py](../benchmarks/performance.py) measured on a machine without a GPU:

```bash
uv run python benchmarks/performance.py
```

{hardware}. Machines differ and are noisy: read the ratios, not the seconds. Both sides of a ratio
were measured by turns in one run; figures in brackets are quartiles.
"""
GPU_HEAD = """## On a GPU

What [benchmarks/gpu.py](../benchmarks/gpu.py) measures in 9 minutes; it needs a GPU, of 80 GB or
more:

```bash
python3 benchmarks/gpu.py
```
"""


def write_page(path: Path, found: dict[str, list]) -> None:
    parts = []
    for key, part in PARTS.items():
        none = [("", {part.table.columns[0]: gpu.NOT_MEASURED})]
        parts.append(gpu.markdown(part.table, found.get(key, none), level=2))
    on_gpu, figures = gpu.read_results(ROOT / "benchmarks" / "results" / "gpu.txt")
    head = HEAD.format(hardware=hardware().replace("  ", ", "))
    of_gpu = [GPU_HEAD, on_gpu or "Not measured yet: no GPU was at hand.", "", gpu.report(figures)]
    path.write_text("\n".join([head, *parts, *of_gpu]).rstrip() + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """What bars, logs and other processes write to stderr is shown only after an error."""
    with tempfile.TemporaryFile() as aside:
        sys.stderr.flush()
        shown = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except Exception:
            aside.seek(0)
            os.write(shown, aside.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


def measure(part: Part, quick: bool) -> list[tuple[str, dict]]:
    """All rows of a table, each printed at once; one that fails is the last, and says why."""
    rows = []
    try:
        with quiet():
            for row in part.measure(quick):
                rows.append(row)
                print(f"  {row[0]}: {', '.join(f'{k} {v}' for k, v in row[1].items())}", flush=True)
    except Exception as error:  # the other tables go on
        rows.append(("the rest", {"failed": why(error)}))
        print(f"  failed: {why(error)}", flush=True)
    return rows


def measure_named(key: str, quick: bool) -> list[tuple[str, dict]]:
    return measure(PARTS[key], quick)


def measure_apart(key: str, quick: bool) -> list[tuple[str, dict]]:
    """A table in a process of its own: a heap that others leave may cost a step a quarter more."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_named, key, quick).result()
        except BrokenProcessPool as error:  # killed, as for want of memory
            print(f"  failed: {why(error)}", flush=True)
            return [("all", {"failed": why(error)})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these tables, and no page")
    parser.add_argument("--quick", action="store_true", help="small sizes, and no page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--profile", action="store_true", help="write a trace of a step")
    parser.add_argument("--trace", type=Path, default=ROOT / "runs" / "performance" / "trace.json")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)  # in a fresh process
    args = parser.parse_args()
    if args.peak_of:
        return print(loss_peak(args.peak_of, args.quick))
    if args.profile:
        return write_profile(args.trace, args.quick)
    print(f"{hardware()}\n$ {shlex.join(['python', *sys.argv])}", flush=True)
    found = {}
    for key in args.only or PARTS:
        started = time.monotonic()
        print(f"\n{key}", flush=True)
        found[key] = measure_apart(key, args.quick)
        print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
        if not args.only and not args.quick:  # what is there, if the rest should not come
            write_page(args.out, found)


if __name__ == "__main__":
    main()
