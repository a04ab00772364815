"""Six damaged inputs through the command line: it runs or says one sentence.

What the hundreds of test_mutated_configs.py and test_mutated_files.py call in one process is the
same code; here are exit codes, and what reaches stderr.
"""

import random
import re

import pytest

OF_CONFIG, OF_FILES = 3, 3

pytestmark = pytest.mark.slow


def test_mutated_commands(small_config, text_rows, tmp_path, mutate, tiny_tokenizer_path, forks):
    rng, problems, started = random.Random(3), [], []
    for number in range(OF_CONFIG + OF_FILES):
        path, out = tmp_path / f"run_{number}.yaml", tmp_path / f"out_{number}"
        text = small_config
        names = {path.name, *re.findall(r"[\w.]+(?=:)", small_config)}
        if number < OF_CONFIG:
            path.write_bytes(mutate.change_config(text, rng))
        else:
            files = (text_rows / "train.jsonl", text_rows / "val.jsonl", tiny_tokenizer_path)
            original = files[number % len(files)]
            damaged = tmp_path / f"damaged_{number}{original.suffix}"
            change = mutate.change_json if original.suffix == ".jsonl" else mutate.change_bytes
            damaged.write_bytes(change(original.read_bytes(), rng))
            path.write_text(text.replace(str(original), str(damaged)))
            names = {damaged.name}
        command = ["recipes/rho1_wmtp_distributed.py", "--config", path, f"output_dir={out}"]
        started.append((number, forks.start(command), names, out))
    for number, done, names, out in started:
        (code,) = done.wait()
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"{number}: exit {code}, {lines[-1][:150] if lines else ''}")
        if "Traceback" in done.stderr:
            problems.append(f"{number}: {done.stderr[-1500:]}")
        elif (code == 0) != (out / "summary.json").exists():
            problems.append(f"{number}: exit {code}, files {list(out.glob('*'))}")
        elif code and not any(name in done.stderr for name in names):
            problems.append(f"{number}: does not name what is wrong: {lines[-1:]}")
    assert not problems, "\n".join(problems)
