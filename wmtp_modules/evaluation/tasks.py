"""Reads benchmarks from local files or the Hugging Face hub."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from wmtp_modules.data.sources import (
    ROW_SUFFIXES,
    SPLIT_NAMES,
    BadRow,
    Source,
    fields_of,
    json_rows,
    load_hub,
    split_of,
    visible_files,
)
from wmtp_modules.evaluation.code_contests import CodeContestsTask, code_contests_task
from wmtp_modules.evaluation.humaneval import humaneval_task
from wmtp_modules.evaluation.mbpp import TEST_IDS, MBPPTask, mbpp_task, with_shots
from wmtp_modules.evaluation.task import Task


@dataclass(frozen=True)
class Benchmark:
    """How the rows of a benchmark are read: ``columns`` are all that ``to_task`` reads.

    ``mark`` is a column that only this benchmark has, ``hub_config`` its configuration on the hub.
    """

    title: str
    mark: str
    columns: tuple[str, ...]
    to_task: Callable[[dict], Task]
    hub_config: str | None = None


# fmt: off
TASKS = {
    "mbpp": Benchmark(
        "MBPP", "test_list",
        ("task_id", "text", "prompt", "code", "test_list", "test_setup_code", "test_imports"),
        mbpp_task, hub_config="full",
    ),
    "humaneval": Benchmark(
        "HumanEval", "entry_point",
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        humaneval_task,
    ),
    "code_contests": Benchmark(
        "CodeContests", "generated_tests",
        ("name", "description", "public_tests", "private_tests", "generated_tests", "solutions",
         "time_limit", "memory_limit_bytes", "input_file", "output_file"),
        code_contests_task,
    ),
}
# fmt: on
# Of all benchmarks and of samples, so that a message can say what a wrong file looks like.
COLUMNS = (*{column for benchmark in TASKS.values() for column in benchmark.columns}, "completion")


def load_tasks(
    task: str, source: str | Path, split: str, comparison: str = "official"
) -> list[Task]:
    """The problems of a benchmark, in the order of the source.

    Args:
        task: "mbpp", "humaneval" or "code_contests".
        source: .jsonl or .parquet file, .json file with one list (``sanitized-mbpp.json``), folder
            of .jsonl and .parquet files, or hub name ``owner/name``, which is downloaded whole.
        split: "test" or "all". MBPP is split by task id (11-510 are the test set); for the others
            "test" selects the files or the hub split of that name if there is one. With "all",
            the prompts of MBPP's tasks 2, 3 and 4 contain their own solutions.
        comparison: "official" or "strict" (``compare.py``), for CodeContests.

    Raises:
        ValueError: if the source is missing or unreadable, a row is damaged, incomplete or of
            another benchmark, a task occurs twice, or there is no task.
    """
    benchmark = TASKS[task]
    by_id: dict[int | str, tuple[Task, str]] = {}
    for where, record in _records(str(source), split, benchmark):
        try:
            if isinstance(record, BadRow):
                raise record
            made = benchmark.to_task(record)
        except BadRow as error:
            hint = (
                _other_file(record, benchmark) or f"fix that row of {source}, or download it again"
            )
            raise ValueError(f"{where}: {error}{fields_of(record)}: {hint}") from error
        if made.task_id in by_id:
            raise ValueError(
                f"{where}: task {made.task_id!r} is a duplicate of {by_id[made.task_id][1]}: "
                f"remove one of them, or give a single file of {source}"
            )
        if isinstance(made, CodeContestsTask):
            made = replace(made, comparison=comparison)
        by_id[made.task_id] = made, where
    tasks: list[Task] = [made for made, _ in by_id.values()]
    if not tasks:
        raise ValueError(f"{source} is empty: give a file with {benchmark.title} tasks")
    if task == "mbpp":
        tasks = [*with_shots([made for made in tasks if isinstance(made, MBPPTask)])]
        if split == "test":
            tasks = [made for made in tasks if made.task_id in TEST_IDS]
            if not tasks:
                raise ValueError(
                    f"{source} has none of the MBPP test tasks 11-510, {len(by_id)} others: set "
                    "split=all to use those"
                )
    return tasks


def _records(source: str, split: str, benchmark: Benchmark) -> Iterator[tuple[str, dict | BadRow]]:
    path = Path(source).expanduser()
    if not path.exists():
        parts = _hub_parts(source, split, benchmark)
    elif path.suffix.lower() == ".json" and path.is_file():
        parts = [json_rows(path, path.name, path.read_bytes())]
    else:
        files = _files(path, split, benchmark)
        root = path if path.is_dir() else path.parent
        parts = Source(source, "rows", files=tuple(files), root=root, columns=COLUMNS).parts()
        parts = (records for _, records in parts)
    for records in parts:
        yield from records


def _files(path: Path, split: str, benchmark: Benchmark) -> list[Path]:
    """The row files of a path; only those named after the test split if there are any."""
    if path.is_file():
        if path.suffix.lower() not in ROW_SUFFIXES:
            raise ValueError(f"{path}: expected a .jsonl, .parquet or .json file")
        return [path]
    files = [p for p in visible_files(path) if p.suffix.lower() in ROW_SUFFIXES]
    if not files:
        raise ValueError(f"{path} has no .jsonl or .parquet file: give the path of a file")
    if split == "test" and benchmark.title != "MBPP":
        files = [p for p in files if split_of(p.relative_to(path)) == "test"] or files
    return files


def _hub_parts(name: str, split: str, benchmark: Benchmark) -> Iterator[Iterator]:
    splits = load_hub(name, benchmark.hub_config)
    names = list(splits)
    if split == "test" and benchmark.title != "MBPP":
        names = [own for own in names if own in SPLIT_NAMES["test"]] or names
    for own in names:
        present = [column for column in COLUMNS if column in splits[own].column_names]
        hub = splits[own].select_columns(present)
        yield from (records for _, records in Source(f"{name}:{own}", "hub", hub=hub).parts())


def _other_file(record: object, benchmark: Benchmark) -> str | None:
    """What a row looks like if it does not belong to this benchmark."""
    if not isinstance(record, dict) or record.get(benchmark.mark) is not None:
        return None
    for name, other in TASKS.items():
        if record.get(other.mark) is not None:
            return f"this looks like {other.title}: set task={name}"
    if "completion" in record:
        return "this looks like samples: pass the file as samples, and the tasks as source"
    return (
        f"{benchmark.title} needs the columns {', '.join(benchmark.columns)}; this row has "
        f"{', '.join(record) or 'none of them'}"
    )
