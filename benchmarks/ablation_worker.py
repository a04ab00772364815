"""Runs the jobs of ablation.py in a process of its own, and measures what they give.

A worker loads the recipes by their paths and calls their functions in process: a process group of
one on one core, and no ``tune run`` for each arm.
"""

import json
import os
import shutil
import subprocess
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ablation_grid import Job, python_version
from common import hardware
from omegaconf import DictConfig
from torchtune.config import instantiate

from wmtp_modules.data.loader import heldout_batches
from wmtp_modules.evaluation.measures import read_texts
from wmtp_modules.generation.generate import generate
from wmtp_modules.generation.measure import requests_from_texts
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, mtp_labels
from wmtp_modules.memory.step import load_recipe, recipe_of
from wmtp_modules.models.attention_mask import document_mask
from wmtp_modules.parallel.process_group import die_with_parent, init_process_group
from wmtp_modules.run import plan
from wmtp_modules.run.stopping import StopRequests
from wmtp_modules.scoring.reference import load_reference

N_PROMPTS = 100  # that the decoder goes on from
MOST_BATCHES = 16  # in which acceptance is counted: more than 10,000 targets of each head

_recipes: dict[str, Any] = {}  # loaded modules by name
_group: tuple = ()  # device, mesh, stop requests


def start_worker(logs: str) -> None:
    """Join a process group of one; what recipes print goes to a file."""
    global _group
    die_with_parent()
    log = os.open(f"{logs}/worker_{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    _group = (*init_process_group("cpu"), StopRequests())


def recipe_for(cfg: DictConfig) -> Any:
    path = recipe_of(cfg)
    if path.stem not in _recipes:
        _recipes[path.stem] = load_recipe(path)
    return _recipes[path.stem]


def run_job(job: Job) -> dict:
    """The row of one run; a sentence instead of the recipe's SystemExit if it fails."""
    cfg, output_dir = job.resolved(), job.output_dir
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        for block in job.preparations():
            Path(block["assets_dir"]).parent.mkdir(parents=True, exist_ok=True)
            instantiate(block)
        module = recipe_for(cfg)
        module.check(cfg)
        started, processor = time.perf_counter(), time.process_time()
        measures = (run_critic_recipe if "stages" in cfg else run_rho1_recipe)(module, cfg)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    except SystemExit as error:
        raise RuntimeError(str(error)) from None
    for name in ("best", "training_state", *([] if job.is_model else ["last"])):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    if job.is_model:
        (output_dir / "definition").write_text(job.definition())
    return {
        "setting": job.setting,
        "arm": job.arm,
        "seed": job.seed,
        "definition": job.definition(),
        "overrides": job.changes,
        "measures": measures,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    git = subprocess.run(("git", "rev-parse", "--short", "HEAD"), capture_output=True, text=True)
    return {
        "python": python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
        "hardware": hardware().partition("  ")[2],  # without the date
    }


def run_rho1_recipe(module: Any, cfg: DictConfig) -> dict:
    recipe = module.Rho1WMTPRecipeDistributed(cfg, *_group)
    recipe.setup()
    return train(recipe, cfg)


def run_critic_recipe(module: Any, cfg: DictConfig) -> dict:
    recipe = module.CriticWMTPRecipeDistributed(cfg, *_group)
    if "policy" not in cfg.stages:
        return module.make_stages(recipe, list(cfg.stages))
    module.make_stages(recipe, [])
    recipe.setup_policy(cfg)
    return train(recipe, cfg)


def train(recipe: Any, cfg: DictConfig) -> dict:
    """Train what is set up, and measure it."""
    stops = _group[-1]
    summary = plan.train(recipe, cfg, stops, {}, time.perf_counter())
    output_dir = Path(cfg.output_dir)
    losses = summary["heldout_loss"]
    lines = [json.loads(x) for x in (output_dir / "metrics.jsonl").read_text().splitlines()]
    marked = [line for line in lines if "noise_in_weight" in line]
    measures = {
        "steps": summary["steps"],
        "base": losses["base"],
        "heldout": losses[cfg.weighting.name],
        "acceptance": acceptance(recipe, cfg),
        "decoding": summary["acceptance"].get(cfg.weighting.name, {}),  # on held-out text
        "base_decoding": summary["acceptance"].get("base", {}),
        "decoder": decoder(cfg),
        "spikes": n_lines(output_dir / "loss_spikes.jsonl"),
        "skipped": n_lines(output_dir / "skipped_steps.jsonl"),
    }
    if marked:  # means over steps; one without a marked target logs no share of it, which is 0
        steps = sum("weighted_loss" in line for line in lines)
        for name in ("noise_in_data", "noise_in_weight"):
            measures[name] = sum(line[name] for line in marked) / steps
    return measures


def n_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def decoder(cfg: DictConfig) -> dict:
    """What the decoder gives on what the model writes itself, after beginnings of held-out texts.

    Tokens per forward, and the share of forwards that kept the guesses up to each head.
    """
    if cfg.model.n_future_tokens == 1:
        return {}
    context, tokenizer = cfg.tokenizer.max_seq_len, instantiate(cfg.tokenizer)
    model = load_reference(
        Path(cfg.output_dir) / "last",
        tokenizer_path=cfg.tokenizer.path,
        max_seq_len=context,
        n_future_tokens=cfg.model.n_future_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows = read_texts(cfg.dataset_val.source)
    how = {"n_requests": N_PROMPTS, "prompt_tokens": context // 4}
    requests = requests_from_texts(tokenizer, rows, **how)
    done = generate(
        model,
        tokenizer,
        requests,
        batch_size=len(requests),
        decoding="self_speculative",
        max_new_tokens=context - context // 4,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        stop=(),
        dtype=torch.float32,
    )
    forwards, new = sum(one.forwards for one in done), sum(len(one.tokens) - 1 for one in done)
    kept = [sum(counts) for counts in zip(*(one.accepted for one in done), strict=True)]
    return {"tokens_per_forward": new / forwards, "per_head": [n / forwards for n in kept]}


@torch.no_grad()
def acceptance(recipe: Any, cfg: DictConfig) -> list[float]:
    """Of heads 1 to K - 1: the share of held-out targets for which a head's choice is head 0's.

    Head k at position t and head 0 at t + k choose for the same token; where they agree,
    self-speculative decoding would accept the guess if it had come so far.
    """
    model = recipe._model.eval()
    K = model.n_future_tokens
    same, count = torch.zeros(K), torch.zeros(K)
    batches = heldout_batches(recipe._dataset_val, cfg.batch_size, 0, 1, recipe.device)
    for batch in islice(batches, MOST_BATCHES):
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask = document_mask(batch["doc"])
        choice_BTK = model(batch["tokens"], mask=mask, input_pos=batch["input_pos"]).argmax(-1)
        for k in range(1, K):
            valid_BT = labels_BTK[:, :-k, k] != IGNORE_INDEX
            agrees_BT = choice_BTK[:, :-k, k] == choice_BTK[:, k:, 0]
            same[k] += (agrees_BT & valid_BT).sum()
            count[k] += valid_BT.sum()
    return (same[1:] / count[1:].clamp(min=1)).tolist()
