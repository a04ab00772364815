"""The references that are shipped have the heads of the models that they are for."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from wmtp_modules.models import mtp_sheared_llama_1_3b

ROOT = Path(__file__).parents[2]
OF = {  # reference, and who uses it
    "quickstart/reference": ["quickstart/rho1"],
    "rho1/reference": [
        *("rho1/7b", "rho1/7b_topk", "rho1/7b_single_gpu", "rho1/7b_lora", "rho1/7b_qlora"),
    ],
}


def load(name):
    return OmegaConf.load(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize(("name", "users"), OF.items())
def test_a_reference_has_the_heads_of_the_model(name, users):
    reference = load(name)
    for user in map(load, users):
        assert reference.model.n_future_tokens == user.model.n_future_tokens == 4
        folder = Path(user.reference.checkpointer.checkpoint_dir)
        assert folder.parent == Path(reference.output_dir)
        assert reference.tokenizer.max_seq_len >= user.tokenizer.max_seq_len


def test_every_config_with_a_reference_is_among_these():
    paths = [p for p in ROOT.glob("configs/*/*.yaml") if OmegaConf.load(p).get("reference")]
    used = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in paths}
    assert used == {user for users in OF.values() for user in users}


def test_the_7b_reference_starts_from_what_the_command_before_it_makes():
    """In the config's header, in README and in docs/7b.md: convert, then train."""
    made = load("rho1/reference").checkpointer.checkpoint_dir
    for file in ("configs/rho1/reference.yaml", "README.md", "docs/7b.md"):
        text = (ROOT / file).read_text()
        convert = re.search(r"wmtp_modules.convert (\S+) (\S+) --to mtp", text)
        assert convert[2] == made
        train = re.search(r"tune run .* --config configs/rho1/reference.yaml", text)
        assert convert.start() < train.start()


def test_what_four_heads_cost_is_what_the_texts_say():
    size = {}
    for heads in (1, 4):
        with torch.device("meta"):
            model = mtp_sheared_llama_1_3b(n_future_tokens=heads)
        parameters = {name: p.numel() for name, p in model.named_parameters()}
        output = 32_000 * 2048
        products = sum(parameters.values()) - 2 * output + heads * output
        size[heads] = (sum(parameters.values()), products)
    (few, few_products), (many, many_products) = size[1], size[4]
    assert many_products / few_products == pytest.approx(1.27, abs=0.005)
    head = (ROOT / "configs/rho1/reference.yaml").read_text()
    table = (ROOT / "docs/7b.md").read_text()
    for text in (head, table):
        assert f"{few / 1e6:,.0f}M" in text
        assert f"{many / 1e6:,.0f}M" in text
    assert "a quarter more multiplications" in head
    assert f"| {few_products / 1e9:.2f} G | {many_products / 1e9:.2f} G:" in table
