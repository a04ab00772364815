"""Runs samples in the sandbox and keeps their results, each as soon as it is known."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torchtune.utils import get_logger
from tqdm import tqdm

from wmtp_modules.evaluation.evidence import EvidenceStore, result_key
from wmtp_modules.evaluation.task import Task
from wmtp_modules.sandbox.pool import Sandbox

log = get_logger("INFO")


def run_samples(
    sandbox: Sandbox, tasks: Sequence[Task], samples: Sequence[Mapping], path: Path
) -> list[dict]:
    """The results of samples, read from a file or obtained by running them.

    A result that was a fault of the machine is tried again.

    Args:
        samples: rows ``{"task_id", "sample", "temperature", "completion"}``.
        path: file that holds the results so far and receives the new ones.

    Returns one row for each sample, in order: its names and the fields of ``Outcome``.
    """
    store = EvidenceStore(path)
    by_id = {task.task_id: task for task in tasks}
    keys = [result_key(by_id[row["task_id"]], row, sandbox.tier) for row in samples]
    done = {k for k in keys if k in store and store[k]["verdict"] != "infrastructure"}
    missing = [i for i, key in enumerate(keys) if key not in done]
    log.info(f"{path.name}: {len(samples)} programs, {len(samples) - len(missing)} done already")
    jobs = (
        (i, by_id[samples[i]["task_id"]].job(samples[i]["completion"], sandbox.machine_factor))
        for i in missing
    )
    verdicts = Counter()
    with tqdm(total=len(missing), unit="program") as bar:
        for i, outcome in sandbox.run(jobs):
            names = {name: samples[i][name] for name in ("task_id", "sample", "temperature")}
            store.append([{"key": keys[i], **names, **asdict(outcome)}])
            verdicts[outcome.verdict] += 1
            bar.set_postfix(verdicts, refresh=False)
            bar.update()
    return [store[key] for key in keys]
