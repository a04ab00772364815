"""Builds, writes and prints the report of an evaluation: ``report.{json,md,png}``."""

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from wmtp_modules.evaluation.compare import other_comparison
from wmtp_modules.evaluation.pass_at_k import best_temperatures, pass_at_k
from wmtp_modules.evaluation.task import Task
from wmtp_modules.files import alone_in, new_file
from wmtp_modules.reports.evaluation_page import comparison_sentence, percent, report_page

FILES = ("report.json", "report.md", "report.png")
# Gloeckle et al. 2024 (arXiv 2404.19737), table 1; "problems" is the size of the test set.
PUBLISHED = Path(__file__).with_name("published.json")
HUMANEVAL_ID = re.compile(r"HumanEval/\d+")


def build_report(
    *,
    task: str,
    tasks: Sequence[Task],
    results: Sequence[Mapping],
    references: Sequence[Mapping],
    ks: Sequence[int],
    seed: int,
    tier: str,
    self_test: Mapping,
    machine_factor: float,
    comparison: str | None = None,
) -> dict:
    """The figures of an execution, in the form of ``report.json``.

    A problem is scored if it has a result and its reference did not fail here. A problem without
    a Python 3 reference is scored too: it has tests, and omitting it would favour the problems
    that someone solved in Python. Results with verdict "infrastructure" are not counted.

    Args:
        task: name of the benchmark.
        tasks: its problems.
        results: rows with task_id, temperature (None for samples from a file) and verdict; the
            temperature that comes first provides the headline.
        references: rows with task_id, verdict and detail, of the references that were run.
        seed: of the bootstrap.
        self_test: what the sandbox proved before the first program.
        machine_factor: by which time limits were multiplied.
        comparison: by which outputs were judged (``evaluation/compare.py``); None for benchmarks
            without outputs. Rows then have "other", the verdict by the other comparison, unless
            they were made before there was one.

    Returns:
        "samples" and "verdicts" are of all temperatures, "pass_at_k" and "omitted_k" of the
        headline's "temperature"; "tasks_without_samples" includes those with only
        "infrastructure" results; "oracle_temperature" is empty without several temperatures;
        "other_comparison" counts the verdicts that the other comparison would change.
    """
    failed = [
        {key: row[key] for key in ("task_id", "verdict", "detail")}
        for row in references
        if row["verdict"] != "pass"
    ]
    unscored = {row["task_id"] for row in failed}
    temperatures = list(dict.fromkeys(row.get("temperature") for row in results))
    by_temperature = [_at_temperature(results, at, unscored, ks, seed) for at in temperatures]
    figures = [(at["temperature"], at["pass_at_k"]) for at in by_temperature]
    first = by_temperature[0] if by_temperature else pass_at_k({}, ks, seed)
    counted = {row["task_id"] for row in results if row["verdict"] != "infrastructure"}
    verdicts = Counter(row["verdict"] for row in results)
    without_reference = [made for made in tasks if made.reference is None]
    return {
        "task": task,
        "tier": tier,
        "self_test": dict(self_test),
        "machine_factor": machine_factor,
        "problems": len(counted - unscored),
        "samples": len(results),
        "verdicts": dict(verdicts.most_common()),
        "temperature": temperatures[0] if temperatures else None,
        "pass_at_k": first["pass_at_k"],
        "omitted_k": first["omitted_k"],
        "reference_failures": failed,
        "not_supported": {
            "problems": len(without_reference),
            "languages": dict(
                Counter(name for made in without_reference for name in made.reference_languages)
            ),
        },
        "tasks_without_samples": sum(made.task_id not in counted for made in tasks),
        "infrastructure": verdicts["infrastructure"],
        "comparison": comparison,
        "other_comparison": _other_comparison(comparison, results) if comparison else None,
        "by_temperature": by_temperature,
        "oracle_temperature": best_temperatures(figures) if len(figures) > 1 else {},
        "published": _published(task, tasks),
    }


def write_report(report: Mapping, output_dir: str | Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``, each whole or not at all.

    ``report`` is from ``build_report``, held-out measures, decoding speed, or all merged; its
    ``settings`` and ``machine``, mappings or strings, are shown too.
    """
    # matplotlib takes two seconds to import, so not at start-up.
    from wmtp_modules.reports.evaluation_figure import draw_report

    picture = io.BytesIO()
    figure = draw_report(report)
    if figure is not None:
        figure.savefig(picture, format="png", dpi=130)
    page = report_page(report, with_figure=figure is not None)
    # NaN is not JSON; a figure that is not finite would be our own bug.
    texts = (json.dumps(report, indent=1, allow_nan=False).encode(), page.encode())
    with alone_in(output_dir, wait=True):  # no page of one process with the figures of another
        for name, content in zip(FILES, (*texts, picture.getvalue()), strict=True):
            if content:
                with new_file(Path(output_dir, name)) as unfinished:
                    unfinished.write_bytes(content)


def report_metrics(report: Mapping) -> dict[str, float]:
    """The figures of a report under names that MLflow accepts."""
    metrics = {}
    for at in report.get("by_temperature", ()):
        where = "" if at["temperature"] is None else f"/T{at['temperature']}"
        metrics |= {f"pass_at_{k}{where}": v["value"] for k, v in at["pass_at_k"].items()}
    for row in report.get("per_head", ()):
        names = ("loss", "top1", "top5", "ece")
        metrics |= {f"heldout/{name}_head_{row['head']}": row[name] for name in names}
    names = ("acceptance_length", "tokens_per_forward")
    names += ("plain_tokens_per_s", "self_speculative_tokens_per_s")
    metrics |= {name: report.get(name) for name in names}
    return {name: value for name, value in metrics.items() if value is not None}


def print_report(report: Mapping) -> None:
    """Print the main figures to standard output."""
    if "pass_at_k" in report:
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in report["verdicts"].items())
        print(f"{report['task']}: {report['problems']} problems, tier {report['tier']}, {verdicts}")
        if report.get("comparison"):
            print(f"  {comparison_sentence(report)}")
        for at in report["by_temperature"]:
            where = "" if at["temperature"] is None else f" at temperature {at['temperature']}"
            for k, figure in at["pass_at_k"].items():
                print(f"  pass@{k}{where}: {percent(figure)}")
        omitted = ", ".join(f"pass@{k}" for k in report["omitted_k"])
        if omitted:
            print(f"  omitted, too few samples: {omitted}")
        for row in report["reference_failures"]:
            print(f"  not scored, its reference fails here: {row['task_id']}: {row['verdict']}")
    too_long = report.get("generation", {}).get("finish_reasons", {}).get("prompt_too_long", 0)
    if too_long:
        print(f"  {too_long} samples count as failed, because their prompts leave no room")
    for row in report.get("per_head", ()):
        if row["tokens"]:
            print(
                f"head {row['head']}: loss {row['loss']:.4f} nats, top-1 {row['top1']:.1%}, "
                f"top-5 {row['top5']:.1%}, {row['tokens']} tokens"
            )
    if report.get("acceptance_length") is not None:
        print(f"acceptance length on held-out text: {report['acceptance_length']:.2f}")
    if report.get("tokens_per_forward"):
        same = "the same text" if report["identical"] else "NOT the same text"
        print(
            f"self-speculative: {report['tokens_per_forward']:.2f} tokens per forward, "
            f"{report['self_speculative_tokens_per_s']:.1f} tokens/s against "
            f"{report['plain_tokens_per_s']:.1f} plain, {same}"
        )


def _at_temperature(
    results: Sequence[Mapping],
    temperature: float | None,
    unscored: set,
    ks: Sequence[int],
    seed: int,
) -> dict:
    counts: dict[int | str, tuple[int, int]] = {}
    results = [row for row in results if row.get("temperature") == temperature]
    for row in results:
        if row["verdict"] == "infrastructure" or row["task_id"] in unscored:
            continue
        n, c = counts.get(row["task_id"], (0, 0))
        counts[row["task_id"]] = n + 1, c + (row["verdict"] == "pass")
    return {
        "temperature": temperature,
        "problems": len(counts),
        "samples": len(results),
        "verdicts": dict(Counter(row["verdict"] for row in results).most_common()),
        **pass_at_k(counts, ks, seed),
    }


def _other_comparison(comparison: str, results: Sequence[Mapping]) -> dict:
    """How the verdicts by the other comparison differ: "known" of all results have one."""
    known = [row for row in results if row.get("other") and row["verdict"] != "infrastructure"]
    changed = Counter(
        "to_pass" if row["other"] == "pass" else "from_pass" if row["verdict"] == "pass" else "rest"
        for row in known
        if row["verdict"] != row["other"]
    )
    counts = {way: changed[way] for way in ("to_pass", "from_pass")}
    return {
        "name": other_comparison(comparison),
        "known": len(known),
        "changed": changed.total(),
        **counts,
    }


def _published(task: str, tasks: Sequence[Task]) -> list[dict]:
    """The paper's rows for this benchmark; none for other tasks in HumanEval's format."""
    if task == "humaneval" and not all(HUMANEVAL_ID.fullmatch(str(made.task_id)) for made in tasks):
        return []
    return json.loads(PUBLISHED.read_text()).get(task, [])
