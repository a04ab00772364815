"""What the quickstarts need and cannot download: a tokenizer and corpora, made on this machine.

The corpus is the Python standard library's own source. Files are dealt to four disjoint parts:
``base`` and ``reference`` train the starting model and the clean reference, ``finetune`` is
corrupted, ``heldout`` stays clean and measures.
"""

import hashlib
import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path

import sentencepiece as spm
from torchtune.utils import get_logger

log = get_logger("INFO")

VERSION = 3  # of what is made here; a new one makes it again
HELDOUT_CHARACTERS = 4_000  # of each held-out file: enough to measure, quick to score
PARTS = {"base": 0.15, "reference": 0.3, "finetune": 0.15, "heldout": 0.06}  # shares of the files


def stdlib_files() -> list[Path]:
    """Source files of the running interpreter's standard library, tests and packages left out."""
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
    """Replace a share of the non-empty lines by random tokens, as many as the line had.

    Args:
        text: source text.
        share: probability of each non-empty line, in [0, 1].
        tokenizer: whose pieces are drawn.
        rng: source of randomness.

    Returns:
        The corrupted text and the character spans [start, end) that are noise.
    """
    first_piece = 3 + 256  # behind unk, bos, eos and the byte pieces
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
    """Make ``tokenizer.model`` and ``{base,reference,finetune,heldout}.jsonl`` unless there.

    Args:
        assets_dir: folder to fill.
        vocab_size: pieces of the tokenizer.
        corrupted_share: share of the fine-tuning lines that become noise, in [0, 1].
        seed: deals the files and draws the noise.

    Raises:
        ValueError: if ``assets_dir`` holds something else.
    """
    folder = Path(assets_dir)
    made_from = {
        "version": VERSION,
        "python": sys.version.split()[0],
        "vocab_size": vocab_size,
        "corrupted_share": corrupted_share,
        "seed": seed,
    }
    manifest = folder / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text()) == made_from:
        return
    if folder.exists() and any(folder.iterdir()) and not manifest.exists():
        raise ValueError(
            f"{folder} holds files that the quickstart did not make: name another folder"
        )
    log.info(f"Making a tokenizer and corpora from the standard library in {folder} ...")
    # The models in it were trained on the corpora that go.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    seen = set()
    for path in stdlib_files():
        text = path.read_text(encoding="utf-8", errors="strict")
        digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
        if digest in seen:
            continue  # the same file under two names must not lie on both sides of a split
        seen.add(digest)
        point = int.from_bytes(digest[:8], "big") / 2**64
        for name, share in PARTS.items():
            if point < share:
                parts[name].append(text)
                break
            point -= share

    corpus = folder / "tokenizer_corpus.txt"
    corpus.write_text("".join(parts["base"] + parts["reference"]), encoding="utf-8")
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
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rng = random.Random(seed)
    for name, texts in parts.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                row: dict = {"text": text[:HELDOUT_CHARACTERS] if name == "heldout" else text}
                if name == "finetune":
                    row["text"], row["noise"] = corrupt_lines(text, corrupted_share, tokenizer, rng)
                file.write(json.dumps(row) + "\n")
        log.info(f"  {name}: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB")
    manifest.write_text(json.dumps(made_from, indent=1))
