"""Evaluates a multi-token-prediction model: pass@k by running code, and what each head knows.

On 8 GPUs:

    tune run --nproc_per_node 8 recipes/eval_mtp.py --config configs/eval/7b_mbpp.yaml

``stages`` selects what to run; the stages always run in this order:

- ``generate``: generates samples for every task, data-parallel over the samples;
- ``execute``: runs the tasks' own solutions, then every sample, in a sandbox; pass@k;
- ``heldout``: loss, accuracy and calibration of each head on held-out text;
- ``decode_speed``: compares plain with self-speculative decoding.

Results are appended to files in ``output_dir`` as they arrive, so a restarted run continues where
it stopped. Copy this file and edit it: nothing imports it.
"""

import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from torchtune import config, training, utils

from wmtp_modules.checkpoints.read import (
    Checkpoint,
    check_same_vocabulary,
    load_into,
    model_args_from_folder,
)
from wmtp_modules.config.check import check_config
from wmtp_modules.config.keys import (
    DecodeSpeed,
    EvalTokenizer,
    Execution,
    Folder,
    Generation,
    Heldout,
    Places,
)
from wmtp_modules.evaluation.compare import COMPARISONS
from wmtp_modules.evaluation.evidence import EvidenceStore, read_samples
from wmtp_modules.evaluation.execution import run_samples
from wmtp_modules.evaluation.measures import HeldoutSums, heldout_sums, read_rows, read_texts
from wmtp_modules.evaluation.samples import (
    REFERENCE,
    TOO_LONG,
    generation_figures,
    reference_samples,
    wanted_samples,
)
from wmtp_modules.evaluation.task import Task
from wmtp_modules.evaluation.tasks import TASKS, load_tasks
from wmtp_modules.files import new_file
from wmtp_modules.generation.generate import Request, generate_as_completed
from wmtp_modules.generation.measure import measure_decoding, requests_from_texts
from wmtp_modules.models import mtp_llama2
from wmtp_modules.parallel.process_group import (
    all_reduce_sum,
    patient_barrier,
    rank_zero_first,
    share_from_rank_zero,
)
from wmtp_modules.parallel.sharding import DTYPES, cast_parameters_
from wmtp_modules.progress import progress_bar
from wmtp_modules.reports.evaluation import FILES as REPORTS
from wmtp_modules.reports.evaluation import (
    build_report,
    print_report,
    report_metrics,
    write_report,
)
from wmtp_modules.run.metric_logging import JSONLLogger, code_version, describe_machine, make_logger
from wmtp_modules.run.resume import kept
from wmtp_modules.run.start import exit_with_message, parse, process_group
from wmtp_modules.run.stopping import clear_exit
from wmtp_modules.sandbox.pool import Sandbox
from wmtp_modules.scoring.score_table import fingerprint_checkpoint

log = utils.get_logger("INFO")

STAGES = ("generate", "execute", "heldout", "decode_speed")


Tasks = Literal[*TASKS]  # pyrefly: ignore[invalid-literal]  # known when this runs, not before
Comparisons = Literal[*COMPARISONS]  # pyrefly: ignore[invalid-literal]


class Config(Places):
    """Every key of a config; what a component takes is read from its signature."""

    stages: list[str] = Field(description=f"some of {', '.join(STAGES)}")
    checkpointer: Folder | None = Field(None, description="the model to evaluate")
    tokenizer: EvalTokenizer | None = Field(None, description="the tokenizer")
    task: Tasks | None = Field(None, description="what is to be solved")
    source: str | None = Field(None, description="the tasks: a file, or a name on the hub")
    split: Literal["test", "all"] | None = Field(None, description="which of the tasks")
    samples: str | None = Field(
        None, description="file to execute, or reference; null: what generate makes"
    )
    generation: Generation | None = Field(None, description="how samples are made")
    execution: Execution | None = Field(None, description="how they are executed")
    comparison: Comparisons | None = Field(None, description="of CodeContests; null: official")
    k: list[int] | None = Field(None, description="of pass@k, each at least 1")
    heldout: Heldout | None = Field(None, description="of stage heldout")
    decode_speed: DecodeSpeed | None = Field(None, description="of stage decode_speed")


NEEDS = {
    "generate": ("task", "source", "split", "generation", "checkpointer", "tokenizer"),
    "execute": ("task", "source", "split", "execution", "k"),
    "heldout": ("heldout", "checkpointer", "tokenizer"),
    "decode_speed": ("decode_speed", "checkpointer", "tokenizer"),
}


def _stages_have_what_they_need(
    stages, task, source, split, generation, execution, k, heldout, decode_speed, checkpointer,
    tokenizer,
) -> str | None:  # fmt: skip
    given = locals()
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        return f"stages: {unknown[0] if unknown else 'none'!r} is not one of {', '.join(STAGES)}"
    for stage in stages:
        for key in NEEDS[stage]:
            if given[key] is None:
                return f"{key}: missing, stage {stage} needs it"
    return None


def _samples_come_from_one_place(stages, samples) -> str | None:
    if "generate" in stages and samples is not None:
        return f"samples: {samples!r} already exist: remove generate from stages, or set null"
    if "execute" in stages and "generate" not in stages and samples is None:
        return (
            "samples: missing, nothing to execute: give a file of samples (such as samples.jsonl "
            f"of an earlier run), or {REFERENCE}"
        )
    return None


def _numbers_are_usable(generation, k) -> str | None:
    if generation is not None:
        temperatures = generation["temperatures"]
        if not temperatures or min(temperatures) < 0 or len(set(temperatures)) < len(temperatures):
            return f"generation.temperatures: must be distinct and at least 0, got {temperatures}"
    if k is not None and (not k or min(k) < 1):
        return f"k: must be a list of numbers of at least 1, got {k}"
    return None


def _only_outputs_are_compared(task, comparison) -> str | None:
    if comparison is not None and task != "code_contests":
        return f"comparison: {comparison!r} is for task=code_contests, not {task}: remove it"
    return None


def check(cfg: DictConfig) -> None:
    """Check the whole config, before a process group or a model exists."""
    rules = (_stages_have_what_they_need, _samples_come_from_one_place, _numbers_are_usable)
    rules += (_only_outputs_are_compared,)
    check_config(cfg, Config, rules)


class EvalMTPRecipe:
    """The stages of one evaluation, on every rank. ``recipe_main`` calls them."""

    def __init__(self, cfg: DictConfig, device: torch.device) -> None:
        self._cfg = cfg
        self._device = device
        self._dtype = DTYPES[cfg.dtype]
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._output_dir = Path(cfg.output_dir)
        self._stages = [stage for stage in STAGES if stage in cfg.stages]
        self._report: dict = {}

    # ---------------------------------------------------------------- setup

    def setup(self) -> None:
        cfg = self._cfg
        training.set_seed(cfg.seed)
        # Read the user's files first, so that a typo is not found after hours of generation.
        if {"generate", "execute"} & set(self._stages):
            with rank_zero_first():  # it may have to download them
                self._comparison = cfg.get("comparison") or "official"
                self._tasks = load_tasks(cfg.task, cfg.source, cfg.split, self._comparison)
        if "generate" not in self._stages and "execute" in self._stages:
            if cfg.samples == REFERENCE:
                self._samples = reference_samples(self._tasks)
            else:
                self._samples = read_samples(cfg.samples, self._tasks)
        if "heldout" in self._stages:
            self._rows = read_rows(cfg.heldout.source, cfg.heldout.get("columns"))
        if "decode_speed" in self._stages:
            self._texts = read_texts(cfg.decode_speed.source)
        if "execute" in self._stages and self._rank == 0:
            with Sandbox(cfg.execution.tier, workers=1):
                pass  # its self-test
        if self._stages != ["execute"]:
            self._setup_model()
        if self._rank == 0:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            # The report of an earlier run must not be taken for this one's.
            for name in REPORTS:
                (self._output_dir / name).unlink(missing_ok=True)
            clear_exit(self._output_dir)
            with new_file(self._output_dir / "config.yaml") as unfinished:
                OmegaConf.save(OmegaConf.create(kept(cfg)), unfinished)

    def _setup_model(self) -> None:
        """Load the model, whole on every rank and in compute precision: ranks split the work."""
        cfg = self._cfg
        checkpoint = Checkpoint(cfg.checkpointer.checkpoint_dir)
        check_same_vocabulary(cfg.tokenizer.path, checkpoint.tokenizer_path)
        max_seq_len = cfg.tokenizer.get("max_seq_len") or checkpoint.args["max_seq_len"]
        args = model_args_from_folder(cfg.checkpointer.checkpoint_dir, max_seq_len=max_seq_len)
        self._tokenizer = config.instantiate(cfg.tokenizer, max_seq_len=max_seq_len)
        drafts = "decode_speed" in self._stages or (
            "generate" in self._stages and cfg.generation.decoding == "self_speculative"
        )
        if drafts and args["n_future_tokens"] == 1:
            raise ValueError(
                f"{cfg.checkpointer.checkpoint_dir} has only one head, so there are no drafts: "
                "set generation.decoding=plain and remove decode_speed from stages"
            )
        if "generate" in self._stages and cfg.generation.max_new_tokens >= max_seq_len:
            raise ValueError(
                f"generation.max_new_tokens {cfg.generation.max_new_tokens} leaves no room for a "
                f"prompt in a context of {max_seq_len} tokens: reduce it"
            )
        with torch.device("meta"):
            self._model = mtp_llama2(**args)
        cast_parameters_(self._model, self._dtype)
        load_into(self._model, cfg.checkpointer.checkpoint_dir, device=self._device)
        self._model.eval().requires_grad_(False)

    # ------------------------------------------------------------- generate

    def generate(self) -> list[dict]:
        """Generate the samples that ``samples.jsonl`` lacks; returns all of the config's."""
        cfg, folder = self._cfg.generation, self._cfg.checkpointer.checkpoint_dir
        fingerprint = fingerprint_checkpoint(folder) if self._rank == 0 else None
        fingerprint = share_from_rank_zero(fingerprint)  # reading 27 GB takes a while
        path = self._output_dir / "samples.jsonl"
        with rank_zero_first():  # it cuts off a line that a killed run left incomplete
            store = EvidenceStore(path)
        # All that shapes a sample besides its task, temperature and seed; ranks and batches do not.
        settings = {
            "checkpoint": fingerprint,
            "dtype": self._cfg.dtype,
            "max_seq_len": self._model.max_seq_len,
            **{name: cfg[name] for name in ("top_p", "top_k", "max_new_tokens", "decoding")},
        }
        wanted = wanted_samples(
            self._tasks,
            settings,
            temperatures=cfg.temperatures,
            samples_per_task=cfg.samples_per_task,
            seed=self._cfg.seed,
        )
        missing = [(row, task) for row, task in wanted if row["key"] not in store]
        done = len(wanted) - len(missing)
        utils.log_rank_zero(log, f"generate: {len(wanted)} samples, {done} already generated")
        patient_barrier()  # no rank appends before all have read
        mine = missing[self._rank :: self._world]
        total, shown = len(mine), self._rank == 0
        with progress_bar(desc="generate", total=total, unit="sample", shown=shown) as bar:
            for temperature in cfg.temperatures:
                todo = [item for item in mine if item[0]["temperature"] == temperature]
                for row in self._complete(todo, temperature):
                    store.append([row])  # as each ends: a killed run loses what is in the batch
                    bar.update()
        patient_barrier()
        if self._rank != 0:
            return []
        store = EvidenceStore(path)  # with the other ranks' rows
        samples = [store[row["key"]] for row, _ in wanted]
        self._report["generation"] = generation_figures(samples)
        return samples

    def _complete(self, todo: list[tuple[dict, Task]], temperature: float) -> Iterator[dict]:
        """Complete rows of one temperature, each as it ends."""
        cfg = self._cfg.generation
        room = self._model.max_seq_len - cfg.max_new_tokens
        encode = cache(partial(self._tokenizer.encode, add_eos=False))  # many samples share one
        rows, requests = [], []
        for row, task in todo:
            prompt = tuple(encode(task.prompt))
            if len(prompt) <= room:
                rows.append(row)
                requests.append(Request(prompt, row["seed"]))
            else:  # it gets an empty sample, which fails; the report counts these
                yield row | {"completion": "", "finish_reason": TOO_LONG}
        for i, made in generate_as_completed(
            self._model,
            self._tokenizer,
            requests,
            temperature=temperature,
            stop=todo[0][1].stop if todo else (),
            dtype=self._dtype,
            **{name: cfg[name] for name in ("top_p", "top_k", "max_new_tokens", "decoding")},
            batch_size=cfg.batch_size,
        ):
            yield rows[i] | {
                "completion": made.text,
                "finish_reason": made.finish_reason,
                "tokens": len(made.tokens),
                "forwards": made.forwards,
                "accepted": made.accepted,
            }

    # -------------------------------------------------------------- execute

    def execute(self, samples: list[dict]) -> None:
        """Run the tasks' own solutions, then the samples without a result; on rank 0 only."""
        cfg = self._cfg
        workers = cfg.execution.get("workers") or len(os.sched_getaffinity(0))
        with Sandbox(cfg.execution.tier, workers) as sandbox:
            log.info(f"execute: sandbox tier {sandbox.tier}, {workers} workers")
            run = partial(run_samples, sandbox, self._tasks)
            if cfg.get("samples") == REFERENCE:
                references = results = run(samples, self._output_dir / "results.jsonl")
            else:
                by_id = {task.task_id: task for task in self._tasks}
                sampled = [by_id[name] for name in dict.fromkeys(row["task_id"] for row in samples)]
                references = run(reference_samples(sampled), self._output_dir / "references.jsonl")
                results = run(samples, self._output_dir / "results.jsonl")
            self._report |= build_report(
                task=cfg.task,
                tasks=self._tasks,
                results=results,
                references=references,
                ks=cfg.k,
                seed=cfg.seed,
                tier=sandbox.tier,
                self_test=sandbox.self_test,
                machine_factor=sandbox.machine_factor,
                comparison=self._comparison if cfg.task == "code_contests" else None,
            )

    # ------------------------------------------------------------ the heads

    def heldout(self) -> None:
        """Loss, accuracy and calibration of each head, over the texts of all ranks."""
        cfg = self._cfg.heldout
        sums = heldout_sums(
            self._model,
            self._tokenizer,
            self._rows[self._rank :: self._world],
            device=self._device,
            batch_tokens=cfg.batch_tokens,
            show_progress=self._rank == 0,
        )
        self._report |= HeldoutSums(*all_reduce_sum(*sums)).result()

    def decode_speed(self) -> None:
        """Time plain and self-speculative greedy decoding in turn; on rank 0 only."""
        cfg, context = self._cfg.decode_speed, self._model.max_seq_len
        requests = requests_from_texts(
            self._tokenizer,
            self._texts,
            n_requests=cfg.prompts,
            prompt_tokens=min(cfg.prompt_tokens, context // 2),
        )
        room = context - max((len(request.prompt) for request in requests), default=0)
        if room < cfg.max_new_tokens:
            log.info(f"decode_speed: only {room} new tokens fit in the context of {context}")
        self._report |= measure_decoding(
            self._model,
            self._tokenizer,
            requests,
            batch_size=cfg.batch_size,
            max_new_tokens=min(cfg.max_new_tokens, room),
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            stop=(),
            dtype=self._dtype,
        )

    # --------------------------------------------------------------- report

    def run(self) -> None:
        """Run the stages of the config, and write the report after each of them."""
        machine = describe_machine(self._device, self._world) | code_version()
        self._report = {"settings": kept(self._cfg), "machine": machine}
        for stage in self._stages:
            if stage == "generate":
                self._samples = self.generate()
            elif stage == "heldout":
                self.heldout()
            elif stage == "execute" and self._rank == 0:
                self.execute(self._samples)
            elif stage == "decode_speed" and self._rank == 0:
                self.decode_speed()
            if self._rank == 0:
                write_report(self._report, self._output_dir)
            patient_barrier()
        if self._rank == 0:
            self.tell()

    def tell(self) -> None:
        """Print the report and log it."""
        report = self._report
        if logger := make_logger(self._cfg, self._output_dir):
            logger.log_config(
                OmegaConf.create(kept(self._cfg) | {"output_dir": self._cfg.output_dir})
            )
            for one in (JSONLLogger(self._output_dir / "metrics.jsonl"), logger):
                one.log_dict(report_metrics(report), step=0)
            if hasattr(logger, "log_artifact"):
                for path in sorted(self._output_dir.glob("[!.]*.*")):
                    logger.log_artifact(path)
            logger.close()
        print_report(report)
        for name in REPORTS:
            if (self._output_dir / name).exists():
                print(self._output_dir / name)


@parse
def recipe_main(cfg: DictConfig) -> None:
    with exit_with_message(ValueError, OSError):
        check(cfg)
    # Every stage goes on where it was ended: a signal ends it at once.
    with process_group(cfg, again="the same command") as (device, _, _):
        with exit_with_message(ValueError, OSError):
            if cfg.get("prepare") and dist.get_rank() == 0:
                config.instantiate(cfg.prepare)
        patient_barrier()
        with exit_with_message(ValueError, OSError):
            recipe = EvalMTPRecipe(cfg, device)
            recipe.setup()
            recipe.run()


if __name__ == "__main__":
    sys.exit(recipe_main())
