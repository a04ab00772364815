"""What the 7B configs say of their schedule: epochs, and what differs from the paper's."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wmtp_modules.run.figures import MOST_EPOCHS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/7b*.yaml") if path.parent.name != "eval")
# CodeContests has 13,328 training problems; max_solutions is 16; rows have some 1,111 tokens. A
# critic's policy has as many incorrect solutions.
MOST_TOKENS = 13_328 * 16 * 1_111


def head_of(path):
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_7b_config_sees_its_data_at_most_four_times(path):
    cfg, head = OmegaConf.load(path), head_of(path)
    ranks = int((re.search(r"--nproc_per_node (\d+)", head) or [0, 1])[1])
    packs = ranks * cfg.batch_size * cfg.gradient_accumulation_steps
    tokens = packs * cfg.tokenizer.max_seq_len
    assert 0.24e6 < tokens < 0.27e6
    kinds = 2 if cfg.dataset.get("incorrect") else 1
    epochs = cfg.max_steps * tokens / (MOST_TOKENS * kinds)
    assert epochs < 0.6 * MOST_EPOCHS  # problems with fewer than 16 solutions leave less data
    assert cfg.num_warmup_steps < 0.1 * cfg.max_steps
    assert f"{cfg.max_steps:,} steps are {epochs:.1f} epochs" in head


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_7b_config_says_what_differs_from_the_paper(path):
    head = head_of(path)
    for part in ("13,000 steps", "correct and incorrect solutions", "the reward in the prompt"):
        assert part in head
    (clip,) = re.findall(r"^clip_grad_norm: 0\.1 +# (.+)$", path.read_text(), re.M)
    assert "mean over heads" in clip


def test_no_text_says_that_the_schedule_is_the_papers():
    for path in (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        text = re.sub(r"[\s#]+", " ", path.read_text())
        assert not re.search(r"steps[^.:;]* (are|is) those of (Meta|the paper)", text), path
