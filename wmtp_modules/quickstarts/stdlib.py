"""Makes the tokenizer and corpora of the quickstarts on this machine.

The corpus is the source of the Python standard library, its files in four disjoint parts: ``base``
and ``reference`` train the starting model and the clean reference, ``finetune`` is corrupted,
``heldout`` stays clean for evaluation.
"""

import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece as spm
from torchtune.utils import get_logger

from wmtp_modules.files import new_folder, only_writer

log = get_logger("INFO")

VERSION = 4  # of the files made here; a new version makes them again
HELDOUT_CHARACTERS = 4_000  # of each held-out file: enough to evaluate, quick to score
PARTS = {"base": 0.15, "reference": 0.3, "finetune": 0.15, "heldout": 0.06}  # shares of the files


def stdlib_files() -> list[Path]:
    """Source files of this interpreter's standard library, without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not skip & set(path.relative_to(root).parts) and 1_000 < path.stat().st_size < 200_000
    ]


def corrupt_lines(
    text: str, share: float, tokenizer: spm.SentencePieceProcessor, rng: random.Random
) -> tuple[str, list[list[int]]]:
    """Replace a share of the non-empty lines by as many random tokens.

    Returns the corrupted text and the character spans [start, end) that are noise.
    """
    first_piece = 3 + 256  # after unk, bos, eos and the byte pieces
    lines, spans, position = [], [], 0
    for line in text.splitlines(keepends=True):
        body = line.rstrip("\n")
        if body.strip() and rng.random() < share:
            n_tokens = len(tokenizer.encode(body))
            noise = tokenizer.decode(
                [rng.randrange(first_piece, tokenizer.vocab_size()) for _ in range(n_tokens)]
            )
            spans.append([position, position + len(noise)])
            line = noise + line[len(body) :]
        lines.append(line)
        position += len(line)
    return "".join(lines), spans


def prepare_stdlib(assets_dir: str, vocab_size: int, corrupted_share: float, seed: int) -> None:
    """Make ``tokenizer.model`` and ``{base,reference,finetune,heldout}.jsonl`` if missing.

    Args:
        corrupted_share: share of the fine-tuning lines that become noise, in [0, 1].
        seed: assigns the files and draws the noise.

    ValueError if ``assets_dir`` has other files.
    """
    made_from = {
        "version": VERSION,
        "python": sys.version.split()[0],
        "vocab_size": vocab_size,
        "corrupted_share": corrupted_share,
        "seed": seed,
    }
    with assets_folder(Path(assets_dir), made_from) as folder:
        if folder is None:
            return
        parts = {name: list(texts.values()) for name, texts in deal_files(PARTS, seed).items()}
        tokenizer = train_tokenizer(folder, parts["base"] + parts["reference"], vocab_size)
        rng = random.Random(seed)
        for name, texts in parts.items():
            rows: list[dict] = [{"text": text} for text in texts]
            for row in rows:
                if name == "heldout":
                    row["text"] = row["text"][:HELDOUT_CHARACTERS]
                elif name == "finetune":
                    row["text"], row["noise"] = corrupt_lines(
                        row["text"], corrupted_share, tokenizer, rng
                    )
            write_rows(folder / f"{name}.jsonl", rows)
            log.info(f"  {name}: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB")


@contextmanager
def assets_folder(folder: Path, made_from: dict) -> Iterator[Path | None]:
    """Fill a folder unless it was already made from the same inputs; it appears when complete.

    ``made_from`` is everything that shapes the files, kept as ``manifest.json``. Yields the folder
    to fill, which then replaces ``folder``, including models trained on its old content; None if
    there is nothing to do, also after another process has made the same meanwhile. ValueError if
    ``folder`` has files without such a manifest.
    """
    if _found_in(folder, made_from) == made_from:  # it may lie where nobody can lock anything
        yield None
        return
    with only_writer(folder):
        if _found_in(folder, made_from) == made_from:
            yield None
            return
        log.info(f"Making a tokenizer and corpora in {folder} ...")
        with new_folder(folder) as partial:
            yield partial
            (partial / "manifest.json").write_text(json.dumps(made_from, indent=1))


def _found_in(folder: Path, made_from: dict) -> dict:
    """What the files in a folder were made from; empty without files."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return {}
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        found = None
    same_kind = isinstance(found, dict) and found.keys() == made_from.keys()
    if not same_kind or found.get("quickstart") != made_from.get("quickstart"):
        raise ValueError(
            f"{folder} holds files that the quickstart did not make: use another folder"
        )
    return found


def part_of(key: str, shares: dict[str, float]) -> str | None:
    """The part that a key is assigned to by its hash; None for what the shares leave of 1."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return None


def deal_files(shares: dict[str, float], seed: int) -> dict[str, dict[str, str]]:
    """Assign the files of the standard library to disjoint parts; see ``deal_texts``.

    Texts are keyed by path relative to the standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="strict")
        for path in stdlib_files()
    }
    return deal_texts(texts, shares, seed)


def deal_texts(
    texts: dict[str, str], shares: dict[str, float], seed: int
) -> dict[str, dict[str, str]]:
    """Assign texts to disjoint parts, by a hash of seed and content.

    ``shares`` are of the texts, the rest is not used. Returns for each part its texts by key.
    """
    parts: dict[str, dict[str, str]] = {name: {} for name in shares}
    seen = set()
    for key, text in texts.items():
        name = part_of(f"{seed} {text}", shares)
        # A file under two names must not be on both sides of a split.
        if name is not None and text not in seen:
            parts[name][key] = text
        seen.add(text)
    return parts


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> spm.SentencePieceProcessor:
    """Train ``tokenizer.model`` in a folder: byte-pair encoding that keeps text exact."""
    corpus = folder / "tokenizer_corpus.txt"
    corpus.write_text("".join(texts), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        # Text stays exact: the defaults would collapse newlines and indentation.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        split_digits=True,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    corpus.unlink()
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
