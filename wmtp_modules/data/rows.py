"""Builds tokenised rows: reads a source, drops what must not be trained on, tokenises, caches.

``datasets`` caches them under a fingerprint of everything that shapes them: built once for all
ranks and restarts.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import sentencepiece
from datasets.exceptions import DatasetGenerationError
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.utils import get_logger, log_rank_zero

from wmtp_modules.data import contamination, sources, tokenize
from wmtp_modules.data.sources import SHOWN, BadRow, BadRows, Source, fields_of, text_field
from wmtp_modules.files import new_file
from wmtp_modules.progress import quiet_datasets

FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "keep": datasets.List(datasets.Value("bool")),
        "noise": datasets.List(datasets.Value("bool")),
        "reward": datasets.Value("float64"),
        "problem_id": datasets.Value("string"),
        # Also as text, because a reward model has its own tokenizer.
        "prompt": datasets.Value("string"),
        "response": datasets.Value("string"),
    }
)
OPTIONAL = ("noise", "reward", "problem_id", "prompt", "response")

log = get_logger("INFO")


@dataclass(frozen=True)
class Sample:
    """A training sample: plain text (no prompt), or a response to a prompt."""

    response: str
    prompt: str | None = None
    noise: tuple[tuple[int, int], ...] = ()  # [start, end) in characters of the response
    reward: float | None = None
    problem_id: str | None = None


def rows_dataset(
    tokenizer: Llama2Tokenizer,
    *,
    source: str,
    split: str = "train",
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> datasets.Dataset:
    """Tokenised rows of plain text or of prompts and responses.

    Args:
        tokenizer: its ``max_seq_len`` is the length at which plain text is split and beyond which
            a prompt/response row is dropped.
        source: .jsonl or .parquet file, folder of those, folder of text or code files, or hub
            name. Rows are ``{"text"}`` or ``{"prompt", "response"}``, with ``"reward"?``,
            ``"problem_id"?`` and ``"noise"?``: corrupted [start, end) spans in characters of the
            text, or of the response.
        split: "train" or "validation".
        validation_fraction: share of the texts, or of the problems, held out by hash; a source
            with its own validation split keeps that.
        seed: of the split.

    Returns:
        Rows ``tokens`` int32 and ``keep`` bool, and if the source has them ``noise`` bool,
        ``reward``, ``problem_id``, ``prompt`` and ``response`` (None for plain text).

    Raises:
        ValueError: if the source is missing or unusable, or no row remains.
    """
    return build_rows(
        tokenizer,
        source=source,
        split=split,
        seed=seed,
        validation_fraction=validation_fraction,
        to_samples=_to_samples,
        columns=("text", *OPTIONAL),
        recipe="rows",
    )


def has_marks(rows: datasets.Dataset) -> bool:
    """Whether a token of any row is marked as noise."""
    if "noise" not in rows.column_names:
        return False
    batches = rows.select_columns("noise").with_format("numpy").iter(batch_size=4096)
    return any(np.any(marks) for batch in batches for marks in batch["noise"])


def build_rows(
    tokenizer: Llama2Tokenizer,
    *,
    source: str,
    split: str,
    seed: int,
    to_samples: Callable[[dict], list[Sample]],
    columns: tuple[str, ...],
    recipe: str,
    validation_fraction: float | None,
    hub_config: str | None = None,
    unused: str = "records without a sample",
) -> datasets.Dataset:
    """Build the tokenised rows of a source, or load them memory-mapped from the cache.

    Args beyond those of ``rows_dataset``:
        to_samples: turns a record into samples, or raises ``BadRow``.
        columns: fields of a record that ``to_samples`` reads.
        recipe: identifies ``to_samples`` and its arguments in the cache.
        validation_fraction: None if ``to_samples`` does the split.
        unused: what the report calls records without a sample.

    Raises:
        ValueError: also if the cache is damaged.
        OSError: if the source cannot be read, or the disk is full.
    """
    max_seq_len = tokenizer.max_seq_len
    if max_seq_len is None or max_seq_len < 2:
        raise ValueError(
            f"tokenizer.max_seq_len is {max_seq_len}: set it to the length of packed rows"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"split must be train or validation, got {split!r}")
    divides_itself = validation_fraction is None
    if not divides_itself and not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction must be at least 0 and below 1, got {validation_fraction}"
        )
    opened = sources.open_source(source, split, columns, hub_config)
    if split == "validation" and not (opened.own_split or divides_itself or validation_fraction):
        raise ValueError(
            f"{source} has no validation split: set validation_fraction (to the same value for "
            "training and validation)"
        )
    fraction = 0.0 if opened.own_split or divides_itself else validation_fraction

    def in_split(sample: Sample) -> bool:
        if not fraction:
            return True
        # By problem, so that no solution of a held-out problem is trained on.
        group = sample.problem_id or sample.prompt or sample.response
        digest = hashlib.blake2b(f"{seed} {group}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) < fraction * 2**64) == (split == "validation")

    fingerprint = _fingerprint(
        source=opened.fingerprint,
        names=[opened.kind, Path(opened.name).name],
        recipe=recipe,
        split=split if fraction else None,
        fraction=fraction,
        seed=seed if fraction else None,
        max_seq_len=max_seq_len,
        tokenizer=hashlib.sha256(
            tokenizer._spm_model.spm_model.serialized_model_proto()
        ).hexdigest(),
    )
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE, "wmtp", fingerprint)
    report_path = cache_dir / "report.json"
    quiet_datasets()
    try:
        rows = datasets.Dataset.from_generator(
            _generate,
            features=FEATURES,
            fingerprint=fingerprint,
            cache_dir=str(cache_dir),
            gen_kwargs=dict(
                tokenizer=tokenizer,
                source=opened,
                to_samples=to_samples,
                in_split=in_split,
                report_path=report_path,
                unused=unused,
            ),
        )
        report = json.loads(report_path.read_text())
        text = f"{report['read']} in {opened.note}; {report['left out']}"
        unset = [name for name in OPTIONAL if not report["has"].get(name)]
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ValueError(f"{source} ({split}): {cause}") from error
        if isinstance(cause, OSError):
            raise OSError(
                cause.errno,
                f"{source} ({split}): its rows could not be read or cached "
                f"({cause.strerror or cause}): make room for {cache_dir}, or set HF_HOME to a "
                "folder on another disk",
            ) from error
        raise
    except Exception as error:  # datasets has no exception class for damage
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{source} ({split}): the cached rows in {cache_dir} are damaged: delete that folder "
            "to rebuild them"
        ) from error
    log_rank_zero(log, f"{source} ({split}): {text}")
    return rows.remove_columns(unset)


def _to_samples(record: dict) -> list[Sample]:
    present = [f for f in ("text", "prompt", "response") if record.get(f) is not None]
    if present not in (["text"], ["prompt", "response"]):
        expected = "expected text, or prompt and response"
        raise BadRow(f"fields {', '.join(present) or 'missing'}: {expected}", expected)
    reward, problem_id = record.get("reward"), record.get("problem_id")
    if reward is not None:
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise BadRow(f"reward is {reward!r}, not a number", "reward")
        try:
            # NaN stays: a critic rejects it, and dropping the row would hide it.
            reward = float(reward)
        except OverflowError as error:
            raise BadRow(f"reward is {reward}", "large reward") from error
    if problem_id is not None:
        if isinstance(problem_id, bool) or not isinstance(problem_id, int | str):
            raise BadRow(f"problem_id is {problem_id!r}, not a string or an integer", "problem_id")
        problem_id = str(problem_id)
    *prompt, response = (text_field(record, field) for field in present)
    noise = _spans(record.get("noise") or [], len(response))
    return [Sample(response, prompt[0] if prompt else None, noise, reward, problem_id)]


def _spans(noise: object, length: int) -> tuple[tuple[int, int], ...]:
    spans = noise if isinstance(noise, list) else [noise]
    for span in spans:
        is_pair = isinstance(span, list) and [type(x) for x in span] == [int, int]
        if not is_pair or not 0 <= span[0] < span[1] <= length:
            why = f"noise span {span!r} is not [start, end) within {length} characters"
            raise BadRow(why, "noise span")
    return tuple((start, end) for start, end in spans)


def _generate(
    tokenizer: Llama2Tokenizer,
    source: Source,
    to_samples: Callable[[dict], list[Sample]],
    in_split: Callable[[Sample], bool],
    report_path: Path,
    unused: str,
) -> Iterator[dict]:
    """Yield the rows; at the end write the report next to the cache."""
    guard = contamination.EvaluationGuard()
    count, has, excluded = Counter[str](), Counter[str](), Counter[str]()
    bad, hashes = BadRows(), array("Q")
    for part, records in source.parts():
        valid, bad_of_part = 0, BadRows()
        for where, record in records:
            count["read"] += 1
            try:
                if isinstance(record, BadRow):
                    raise record
                samples = to_samples(record)
            except BadRow as error:
                fields = fields_of(record) if source.kind != "text" else ""
                bad.add(where, error, fields)
                bad_of_part.add(where, error, fields)
                continue
            valid += 1
            count["unused"] += not samples
            for sample in samples:
                is_pair = sample.prompt is not None
                if not in_split(sample):
                    count["other split"] += 1
                    continue
                task = guard.find(f"{sample.prompt or ''}\n{sample.response}")
                if task:
                    excluded[task] += 1
                    continue
                rows = list(_tokenise(tokenizer, sample))
                count["over-long"] += not rows
                if rows:
                    digest = hashlib.blake2b(repr(sample).encode(), digest_size=8).digest()
                    hashes.append(int.from_bytes(digest))
                for row in rows:
                    count["rows"] += 1
                    count["tokens"] += len(row.tokens)
                    has.update(
                        noise=bool(sample.noise),
                        reward=sample.reward is not None,
                        problem_id=sample.problem_id is not None,
                        prompt=is_pair,
                        response=is_pair,
                    )
                    yield {
                        **row._asdict(),
                        "reward": sample.reward,
                        "problem_id": sample.problem_id,
                        "prompt": sample.prompt,
                        "response": sample.response if is_pair else None,
                    }
        if not valid:
            raise ValueError(
                f"{part} has no valid row: {bad_of_part if bad_of_part else 'it is empty'}"
            )
    left_out = {
        f"bad rows ({bad})": len(bad),
        unused: count["unused"],
        "rows of the other split": count["other split"],
        f"rows longer than max_seq_len {tokenizer.max_seq_len}": count["over-long"],
    }
    tasks = f" ({', '.join(sorted(excluded)[:SHOWN])})" if excluded else ""
    count["duplicates"] = len(hashes) - len(np.unique(np.array(hashes)))
    kept = f", {count['duplicates']} exact duplicates of another among them" * bool(
        count["duplicates"]
    )
    read = f"{count['rows']} rows, {count['tokens']} tokens{kept}, from {count['read']} records"
    left = f"left out: {excluded.total()} rows that contain an evaluation task{tasks}" + "".join(
        f", {n} {what}" for what, n in left_out.items() if n
    )
    if not count["rows"]:
        raise ValueError(f"no row remains. {read} in {source.note}; {left}")
    report_path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(report_path) as unfinished:
        unfinished.write_text(
            json.dumps({"read": read, "left out": left, "has": has, "count": count})
        )


def _tokenise(tokenizer: Llama2Tokenizer, sample: Sample) -> Iterator[tokenize.TokenRow]:
    assert tokenizer.max_seq_len is not None  # build_rows has seen to that
    if sample.prompt is None:
        row = tokenize.encode_text(tokenizer, sample.response, sample.noise)
        yield from tokenize.split_row(row, tokenizer.max_seq_len)
    else:
        row = tokenize.encode_pair(tokenizer, sample.prompt, sample.response, sample.noise)
        if len(row.tokens) <= tokenizer.max_seq_len:
            yield row


def _fingerprint(**parts: object) -> str:
    """Hash of everything that shapes the rows, including this package's code."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(f"{sentencepiece.__version__} {datasets.__version__}".encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), contamination.HASHES]):
        if path.name not in ("packing.py", "loader.py"):  # they come after the rows
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
