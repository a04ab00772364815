"""Writes the report of an evaluation as Markdown."""

from collections.abc import Iterable, Mapping, Sequence

VERDICTS = {
    "pass": "all tests passed",
    "wrong": "a test failed",
    "timeout": "over the time limit",
    "memory": "over the memory limit",
    "output_limit": "wrote more than it may",
    "process_limit": "tried to start more processes or threads than it may",
    "crash": "an exception, a signal, or an exit before the end of the tests",
    "policy": "tried to reach the judge",
    "infrastructure": "a fault of this machine, not counted",
}
DETAIL = 160  # characters of a reference's output


def percent(figure: Mapping[str, float]) -> str:
    """A figure of ``pass_at_k`` and its interval, in per cent."""
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def comparison_sentence(report: Mapping) -> str:
    """How outputs were compared, and what the other comparison would change."""
    other = report["other_comparison"]
    return (
        f"outputs compared by {report['comparison']}; {other['name']} would change "
        f"{other['changed']} of {_count(other['known'], 'verdict')}: {other['from_pass']} from "
        f"pass, {other['to_pass']} to pass"
    )


def report_page(report: Mapping, *, with_figure: bool) -> str:
    """A report (see ``write_report``) as Markdown; ``with_figure``: ``report.png`` is beside it."""
    sections = [f"# Evaluation{': ' + report['task'] if 'task' in report else ''}"]
    if "pass_at_k" in report:
        sections += _pass_at_k(report)
    if with_figure:
        sections.append("![figures](report.png)")
    if "pass_at_k" in report:
        sections += [*_verdicts(report), *_left_out(report)]
    if "per_head" in report:
        sections += _heads(report)
    if "tokens_per_forward" in report:
        sections += _decoding(report)
    sections += _circumstances(report)
    return "\n\n".join(sections) + "\n"


def _pass_at_k(report: Mapping) -> list[str]:
    by_temperature, oracle = report["by_temperature"], report["oracle_temperature"]
    published = report["published"]
    ks = list(dict.fromkeys(k for at in by_temperature for k in at["pass_at_k"]))
    if not ks:
        return ["## pass@k", "No problem has a counted sample, so there is nothing to report."]
    columns = ks + [k for k in ("1", "10", "100") if published and k not in ks]
    columns.sort(key=int)

    def cells(figures: Mapping, show) -> list[str]:
        return [show(figures[k]) if k in figures else "" for k in columns]

    rows = []
    for at in by_temperature:
        where = "samples from a file"
        if at["temperature"] is not None:
            where = f"temperature {at['temperature']}"
        rows.append([f"here, {where}", *cells(at["pass_at_k"], percent)])
    if oracle:
        best = cells(oracle, lambda best: f"{percent(best)} (T={best['temperature']})")
        rows.append(["oracle: the best temperature for each k", *best])
    for row in published:
        figures = cells(row["pass_at_k"], lambda value: f"{100 * value:.1f} %")
        rows.append([f"published, not run here: {row['model']}", *figures])
    notes = [
        f"{_count(report['problems'], 'problem')} scored. In brackets the 95 % bootstrap interval "
        "over problems; pass@k is the unbiased estimator of Chen et al. 2021."
    ]
    if report["problems"] == 1:
        notes.append("One problem says nothing about others: its interval covers everything.")
    if report["omitted_k"]:
        omitted = ", ".join(f"pass@{k}" for k in report["omitted_k"])
        notes.append(f"Omitted, because a problem has fewer samples than k: {omitted}.")
    if len(by_temperature) > 1:
        notes.append(
            f"The headline in report.json is at temperature {report['temperature']}, the first of "
            "the config. The oracle's temperature is chosen on these same samples, so the oracle "
            "is never below a fixed temperature: compare like with like."
        )
    if published:
        notes.append(
            "The published rows are table 1 of Gloeckle et al. 2024 (arXiv 2404.19737): "
            f"{published[0]['problems']} problems ({report['problems']} here), 200 samples each, "
            "an oracle temperature for each k. The paper states neither the number of shots nor "
            "top-p for them, so its prompt may differ from the one used here."
        )
    return ["## pass@k", _table(["", *(f"pass@{k}" for k in columns)], rows), *notes]


def _verdicts(report: Mapping) -> list[str]:
    by_temperature = report["by_temperature"]
    shown = by_temperature if len(by_temperature) > 1 else []
    head = ["verdict", "samples", *(f"T={at['temperature']}" for at in shown)]
    rows = [
        [name, report["verdicts"][name], *(at["verdicts"].get(name, 0) for at in shown), meaning]
        for name, meaning in VERDICTS.items()
        if name in report["verdicts"]
    ]
    sections = ["## Verdicts", _table([*head, "what it means"], rows)]
    if report.get("comparison"):
        sentence = comparison_sentence(report)
        sections.append(f"{sentence[0].upper()}{sentence[1:]} (docs/evaluation.md).")
    return sections


def _left_out(report: Mapping) -> list[str]:
    lines = []
    if report["tasks_without_samples"]:
        lines.append(f"{_count(report['tasks_without_samples'], 'task')} without a sample.")
    if report["infrastructure"]:
        lines.append(
            f"{_count(report['infrastructure'], 'sample')} not counted: a fault of this machine."
        )
    unsupported = report["not_supported"]
    if unsupported["problems"]:
        languages = ", ".join(f"{name} {n}" for name, n in unsupported["languages"].items())
        lines.append(
            f"{_count(unsupported['problems'], 'problem')} without a Python 3 solution "
            f"(unsupported languages: {languages or 'none given'}): scored, but no reference was "
            "run."
        )
    failures = report["reference_failures"]
    if failures:
        lines.append(
            f"{_count(len(failures), 'task')} not scored, because the reference fails here:"
        )
        rows = [[row["task_id"], row["verdict"], _one_line(row["detail"])] for row in failures]
        lines.append(_table(["task", "verdict", "what its output ends with"], rows))
    return ["## Left out", *lines] if lines else []


def _heads(report: Mapping) -> list[str]:
    shown = {"head": "d", "tokens": "d", "loss": ".4f", "top1": ".1%", "top5": ".1%", "ece": ".4f"}
    names = [name for name in shown if all(name in row for row in report["per_head"])]
    rows = [[_number(row[name], shown[name]) for name in names] for row in report["per_head"]]
    sections = [
        "## Held-out text",
        _table(names, rows),
        f"{report['tokens']} tokens. Head 0 predicts the next token, head k the one k positions "
        "later. Losses are in nats; ece is the expected calibration error over bins of confidence.",
    ]
    if report.get("acceptance_length") is not None:
        sections.append(
            f"Acceptance length {report['acceptance_length']:.2f}: one plus the mean number of "
            "consecutive heads that choose what head 0 chooses once it gets there, over all "
            "positions. A decoder gives fewer tokens per forward: it leaps over the easy ones."
        )
    if "by_token_class" in report:
        heads = range(len(report["per_head"]))
        rows = [
            [row["class"], f"{row['share']:.1%}", *(_number(loss, ".4f") for loss in row["loss"])]
            for row in report["by_token_class"]
        ]
        names = ["token class", "share", *(f"loss of head {head}" for head in heads)]
        sections.append(_table(names, rows))
    return sections


def _decoding(report: Mapping) -> list[str]:
    names = ("tokens_per_forward", "plain_tokens_per_s", "self_speculative_tokens_per_s")
    rows = [[name.replace("_", " "), _number(report[name], ".2f")] for name in names]
    rows += [
        [f"acceptance of head {head}", _number(share, ".1%")]
        for head, share in enumerate(report["acceptance_per_head"], start=1)
    ]
    rows.append(["same text as plain decoding", "yes" if report["identical"] else "no"])
    differences = report.get("differences", ())
    if differences:
        # In bf16 the texts may differ where two logits nearly tie; a large gap would be an error.
        # The gap is None where one text had ended.
        gap = max(row["logit_gap"] or 0.0 for row in differences)
        rows.append(["differences, largest logit gap", f"{len(differences)}, {gap:.4f}"])
    return ["## Self-speculative decoding", _table(["", ""], rows)]


def _number(value: float | None, form: str) -> str:
    """A figure, or nothing for None, a mean over no tokens."""
    return "" if value is None else f"{value:{form}}"


def _circumstances(report: Mapping) -> list[str]:
    rows = []
    if "tier" in report:
        rows += [
            ["sandbox tier", report["tier"]],
            ["sandbox self-test", _flat(report["self_test"])],
            ["machine factor of time limits", f"{report['machine_factor']:.2f}"],
        ]
    for key in ("generation", "machine", "settings"):
        value = report.get(key)
        if isinstance(value, Mapping):
            rows += [[f"{key}: {name}", _flat(item)] for name, item in value.items()]
        elif value:
            rows.append([key, value])
    return ["## Circumstances", _table(["", ""], rows)] if rows else []


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_flat, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    return line if len(line) <= DETAIL else line[:DETAIL] + "..."


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
