"""Makes the hashes that keep evaluation tasks out of training data.

    uv run python benchmarks/make_eval_prompts.py --mbpp mbpp.jsonl sanitized-mbpp.json \\
        --humaneval HumanEval.jsonl > eval_prompts.json

Replace ``wmtp_modules/data/eval_prompts.json`` with the result.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from wmtp_modules.data.contamination import ANCHOR, hash_words, words_of

MBPP_TEST_IDS = range(11, 511)
# A HumanEval description of fewer words ("Add two numbers x and y") also occurs in unrelated code
# and counts only together with the signature.
MIN_DESCRIPTION_WORDS = 12


def humaneval_words(task: dict) -> list[list[str]]:
    """Words that identify a HumanEval task: its description up to the examples.

    A short description is preceded by the signature, with and without annotations.
    """
    tree = ast.parse(task["prompt"] + "\n    pass\n")
    function = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == task["entry_point"]
    )
    description = next(
        node.value.value
        for node in function.body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    examples = rf">>>|\bexamples?\b|\be\.g\b|^\s*{re.escape(task['entry_point'])}\s*\("
    words = words_of(re.split(examples, description, flags=re.IGNORECASE | re.MULTILINE)[0])
    if len(words) >= MIN_DESCRIPTION_WORDS:
        return [words]
    function.body = [ast.Pass()]
    variants = []
    for _ in range(2):
        variant = words_of(ast.unparse(function).removesuffix("pass")) + words
        if variant not in variants:
            variants.append(variant)
        function.returns = None
        for node in ast.walk(function.args):
            if isinstance(node, ast.arg):
                node.annotation = None
    return variants


def make(argv: list[str] | None = None) -> str:
    """The JSON text of the hashes of the evaluation files that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mbpp", nargs="+", required=True, help="mbpp.jsonl, sanitized-mbpp.json")
    parser.add_argument("--humaneval", required=True, help="HumanEval.jsonl")
    args = parser.parse_args(argv)
    tasks: list[tuple[str, list[str]]] = []
    for path in map(Path, args.mbpp):
        text = path.read_text()
        rows = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else json.loads(text)
        for row in rows:
            if row["task_id"] in MBPP_TEST_IDS:
                task = (f"MBPP/{row['task_id']}", words_of(row.get("text") or row["prompt"]))
                if task not in tasks:  # sanitized or not, the description is often the same
                    tasks.append(task)
    for line in Path(args.humaneval).read_text().splitlines():
        row = json.loads(line)
        tasks += [(row["task_id"], words) for words in humaneval_words(row)]
    items = [
        [task_id, len(words), hash_words(words[:ANCHOR]), hash_words(words)]
        for task_id, words in tasks
    ]
    header = {
        "about": "blake2b-64 hashes of evaluation task descriptions, as lower-case words; "
        "no text but the first two",
        "sources": [
            "MBPP, github.com/google-research/google-research/tree/master/mbpp, CC BY 4.0,"
            " task ids 11-510, full and sanitized descriptions",
            "HumanEval, github.com/openai/human-eval, MIT, all 164 tasks",
        ],
        "columns": ["task", "n_words", f"first {ANCHOR} words", "all words"],
        "first two words": sorted({" ".join(words[:2]) for _, words in tasks}),
    }
    lines = ",\n".join(json.dumps(item) for item in items)
    body = json.dumps(header, indent=1).removesuffix("\n}")
    return f'{body},\n "items": [\n{lines}\n]\n}}\n'


if __name__ == "__main__":
    sys.stdout.write(make())
