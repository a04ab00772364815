"""The two commands that measure: their rows at small shapes, their tables, and rows that fail."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMANDS = {"gpu": ["--tiny", "--minutes", "25"], "performance": ["--quick"]}


@pytest.fixture(scope="module")
def modules():
    """(gpu, performance), imported as the commands import them: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("gpu", "performance_data", "performance", "common")
        made = {name: importlib.import_module(name) for name in names}
        yield made["gpu"], made["performance"]
        for name in names:
            sys.modules.pop(name, None)


def test_each_row_is_told_and_one_that_fails_stops_no_other(modules, tmp_path, monkeypatch):
    gpu, _ = modules
    monkeypatch.setattr(gpu, "estimate_beside", lambda what, tiny: "1.5")
    monkeypatch.setattr(gpu, "exact_logits", lambda sizes: 1 / 0)
    wanted = ("loss, folded, chunked", "logits", "T 4096, padded, full, eager", "plain, batch 1")
    wanted = (*wanted, "self_speculative, batch 1")
    rows = [row for row in gpu.all_rows() if row.name in wanted]
    told: list[dict] = []
    found = gpu.run(gpu.TINY, rows, 5, told.append)
    assert not torch.distributed.is_initialized()
    assert {one["row"] for one in told} == set(wanted)
    assert found["logits"]["failed"].startswith("ZeroDivisionError: division by zero")
    assert found["loss, folded, chunked"]["within"] == "1e-05 yes"
    step = found["T 4096, padded, full, eager"]
    assert step["estimate, GiB"] == "1.5"
    assert 5 < float(step["loss"]) < 8  # ln 512 is 6.2
    tokens = float(step["tokens/s"]) * step["_ms"] / 1000
    batches = gpu.batches_of(gpu.TINY, 2, 64, packed=False)
    assert tokens == pytest.approx(sum((b["doc"] >= 0).sum().item() for b in batches) / 4, rel=0.01)
    assert float(found["self_speculative, batch 1"]["tokens/forward"]) > 2
    assert found["plain, batch 1"]["tokens/forward"] == "1.00"

    file = tmp_path / "gpu.txt"
    file.write_text("\n".join(["a GPU", *map(json.dumps, told)]))
    hardware, again = gpu.read_results(file)
    assert hardware == "a GPU"
    table = gpu.report(again)
    assert "| logits | failed: ZeroDivisionError" in table
    assert table.count(gpu.NOT_MEASURED) >= len(gpu.all_rows()) - len(rows)


def test_what_time_does_not_allow_is_skipped(modules):
    gpu, _ = modules
    rows = [row for row in gpu.all_rows() if row.table == "exactness"]
    found = gpu.run(gpu.TINY, rows, 0, lambda told: None)
    assert len(found) == len(rows) == 7
    assert all("skipped, the 0 minutes are over" in one["failed"] for one in found.values())
    with pytest.raises(TimeoutError), gpu.time_limit(0.05):
        time.sleep(20)


def test_an_inexact_kernel_is_told(modules):
    """bf16 products off by a factor of 1.001, and a gradient that is not there."""
    gpu, _ = modules
    operands = [torch.randn(8, 4), torch.randn(4, 6)]
    wrong = gpu.errors(lambda a, b: (a.float() @ b.float()) * 1.001, torch.matmul, operands, 1e-5)
    assert wrong["within"] == "1e-05 NO"
    one_gone = gpu.errors(lambda a, b: a.detach() @ b + 0 * a.sum(), torch.matmul, operands, 1e-1)
    assert one_gone["gradients, fp64"].startswith("1.0e+00, ")


def test_operations_of_the_7b(modules):
    """6 N + 12 L H Q T by hand: 32 blocks of 4 D^2 + 3 D F, and the output layer four times."""
    gpu, _ = modules
    from wmtp_modules.models import mtp_llama2_7b

    with torch.device("meta"):
        model = mtp_llama2_7b(max_seq_len=4096)
    D, inner, V, T = 4096, 11_008, 32_000, 4096
    N = 32 * (4 * D * D + 3 * D * inner) + 4 * V * D
    assert gpu.operations_per_token(model, T) == 6 * N + 12 * 32 * D * T


def test_padding_is_not_counted(modules):
    gpu, _ = modules
    sizes = replace(gpu.TINY, mean_row=20)
    packed, padded = (gpu.batches_of(sizes, 2, 64, packed=packed) for packed in (True, False))
    share = [
        sum((b["doc"] >= 0).float().mean() for b in batches) / 4 for batches in (packed, padded)
    ]
    assert share[0] > 0.95 > 0.6 > share[1]
    assert all(batch["doc"].max() == 0 for batch in padded)


def test_a_table_of_the_page(modules, tmp_path, capsys):
    _, performance = modules

    def some(quick):
        yield "first", {"programs/s": "3"}
        raise ValueError("no | more")

    part = replace(performance.PARTS["sandbox"], measure=some)
    rows = performance.measure(part, quick=True)
    assert "first: programs/s 3" in capsys.readouterr().out
    performance.write_page(tmp_path / "page.md", {"sandbox": rows})
    page = (tmp_path / "page.md").read_text()
    assert "| first | 3 |\n| the rest | failed: ValueError: no / more" in page
    assert page.count("| not measured |") + page.count("| failed") >= 1
    assert "## On a GPU" in page


def test_the_page_has_every_table(modules):
    """docs/performance.md is what the command writes, GPU rows as gpu.py names them."""
    gpu, performance = modules
    page = (ROOT / "docs" / "performance.md").read_text()
    for part in performance.PARTS.values():
        assert f"## {part.table.title}\n\n{part.table.says}\n" in page
        assert f"| {' | '.join(('', *part.table.columns))} |" in page
    _, found = gpu.read_results(ROOT / "benchmarks" / "results" / "gpu.txt")
    assert gpu.report(found).rstrip() in page


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_a_whole_command(name, tmp_path):
    command = [sys.executable, f"benchmarks/{name}.py", *COMMANDS[name]]
    command += ["--out", str(tmp_path / "out.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert "skipped" not in done.stdout
