"""A model card made from what a run's folder says: nothing in it is written by hand."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wmtp_modules.config.secrets import without_secrets
from wmtp_modules.files import read_json
from wmtp_modules.tracking.outbox import Outbox

# What weights the loss, and of what: the config's blocks that say how a model came to be.
SHOWN = ("weighting", "reference", "rewards", "critic", "optimizer")
SCALARS = ("max_steps", "batch_size", "gradient_accumulation_steps", "seed", "dtype")


def model_card(run_dir: str | Path, name: str, evaluation: str | Path | None = None) -> str:
    """Markdown with the front matter of the Hugging Face Hub.

    Args:
        run_dir: of a finished training run: ``config.yaml`` and ``summary.json``.
        name: the model's.
        evaluation: folder of an evaluation of it, with ``report.json``.

    Raises:
        ValueError: if the run has not ended, or the evaluation's report is not there.
    """
    run_dir = Path(run_dir)
    summary, config = facts_of(run_dir)
    base = (config.get("checkpointer") or {}).get("checkpoint_dir")
    parts = [_front_matter(base), f"# {name}"]
    parts.append(_what_it_is(config, summary, base))
    parts.append("## Held-out loss\n\n" + _losses(summary))
    parts.append("## Training\n\n" + _training(config, summary))
    if evaluation is not None:
        parts.append("## Evaluation\n\n" + _evaluation(Path(evaluation)))
    parts.append("## Made from\n\n" + _made_from(run_dir, summary))
    parts.append("## Licence\n\n" + _licence(base))
    return "\n\n".join(parts) + "\n"


def facts_of(run_dir: Path) -> tuple[dict, dict]:
    """A finished run's summary, and its config without secrets; ValueError if it has not ended."""
    files = run_dir / "summary.json", run_dir / "config.yaml"
    if not all(file.exists() for file in files):
        raise ValueError(
            f"{run_dir} has no summary.json beside a config.yaml, so no training run has ended "
            "there: give the output_dir of one that has"
        )
    summary = read_json(files[0])
    if "heldout_loss" not in summary:
        raise ValueError(f"{files[0]} has no held-out losses: no model was trained there")
    return summary, without_secrets(OmegaConf.to_container(OmegaConf.load(files[1])))


def _front_matter(base: str | None) -> str:
    head = {
        "license": "other",
        "pipeline_tag": "text-generation",
        "tags": ["multi-token-prediction"],
    }
    head |= {"base_model": base} if base else {}
    return "---\n" + OmegaConf.to_yaml(head) + "---"


def _what_it_is(config: dict, summary: dict, base: str | None) -> str:
    heads = len(summary["heldout_loss"]["base"])
    weighting = config.get("weighting", {}).get("name", "uniform")
    start = f"fine-tuned from `{base}`" if base else "trained from nothing"
    return (
        f"A language model that predicts {heads} tokens at once, {start} for {summary['steps']:,} "
        f"steps with `{weighting}` weights on its tokens. The folder is in Meta's format "
        "(`params.json`, `consolidated.pth`, `tokenizer.model`)."
    )


def _losses(summary: dict) -> str:
    """Every run of the config by its name: a claim about weights is one against its controls."""
    losses, changes = summary["heldout_loss"], summary.get("controls", {})
    heads = range(len(losses["base"]))
    tokens = summary.get("tokens_per_forward", {})  # older runs have none
    rows = [["", *(f"head {k}" for k in heads), "mean", *["tokens per forward"] * bool(tokens), ""]]
    for name, loss_K in losses.items():
        told = ", ".join(f"`{key}={value}`" for key, value in changes.get(name, {}).items())
        mean = sum(loss_K) / len(loss_K)
        fast = [f"{tokens[name]:.2f}" if name in tokens else ""] * bool(tokens)
        rows.append([name, *(f"{x:.4f}" for x in [*loss_K, mean]), *fast, told])
    return (
        "Nats per token; `base` is before training, the last row is this model at its end, the "
        "others are controls from the same start. The checkpoint is the one with the lowest mean "
        "of the validations. Tokens per forward are those of greedy self-speculative decoding, as "
        f"far as held-out text tells.\n\n{_table(rows)}"
    )


def _training(config: dict, summary: dict) -> str:
    lines = [f"- {key}: {config[key]}" for key in SCALARS if key in config]
    for part in ("dataset", "dataset_val"):
        source = (config.get(part) or {}).get("source")
        lines.append(f"- {part}: `{source}`" if source else f"- {part}: see the config")
    if data := summary.get("data"):
        counts = ", ".join(f"{value:,} {key}" for key, value in data.items())
        lines.append(f"- data: {counts}")
    blocks = {key: config[key] for key in SHOWN if config.get(key) is not None}
    return "\n".join(lines) + f"\n\n```yaml\n{OmegaConf.to_yaml(blocks)}```"


def _evaluation(folder: Path) -> str:
    file = folder / "report.json"
    if not file.exists():
        raise ValueError(f"{file} is not there: give the output_dir of an evaluation")
    report = read_json(file)
    rows = [["", "value"]]
    rows += [[name, f"{value:.4f}"] for name, value in sorted(_numbers(report).items())]
    return _table(rows)


def _numbers(report: Any, above: str = "") -> dict[str, float]:
    """Figures of a report that are rates or losses, by dotted name."""
    if isinstance(report, dict):
        found: dict[str, float] = {}
        for key, value in report.items():
            found |= _numbers(value, f"{above}.{key}" if above else str(key))
        return found
    if isinstance(report, list):
        found = {}
        for i, value in enumerate(report):
            found |= _numbers(value, f"{above}[{i}]")
        return found
    is_figure = isinstance(report, float) and not isinstance(report, bool)
    return {above: report} if is_figure else {}


def _made_from(run_dir: Path, summary: dict) -> str:
    order = Outbox(run_dir).order()
    known = {} if order is None else dict(sorted(order.tags.items()))
    known |= {key: summary[key] for key in ("made_from", "tracking") if key in summary}
    known["folder"] = str(run_dir)
    return "\n".join(f"- {key}: `{_line(value)}`" for key, value in known.items())


def _line(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("`", "'").replace("\n", " ")


def _licence(base: str | None) -> str:
    """What can be said without a lawyer: whose terms go on, and where they lie."""
    if base is None:
        return "Trained from nothing: the terms of the data hold."
    found = sorted(path.name for path in Path(base).glob("*") if path.name.upper()[:7] in LICENCES)
    where = f"its folder has {', '.join(found)}" if found else "its folder holds no licence file"
    return (
        f"The terms of `{base}` hold for what is made from it; {where}. Meta's multi-token models "
        "are for research only, Llama 3 has a licence of its own; look before you pass this on. "
        "The terms of the data hold as well."
    )


LICENCES = ("LICENSE", "LICENCE")


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
