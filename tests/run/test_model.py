"""What a recipe's own set-up compiles, told by a backend that counts graphs and their runs.

A packed batch on CUDA has a ``BlockMask``, for which torchtune logs a line and calls a kernel that
is hidden from the compiler. Both break the graph of a block. On a CPU the mask is a plain tensor
and nothing breaks, so torchtune is made to believe in flex attention, with a kernel that runs here.
"""

from collections import Counter
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import attention_utils

from wmtp_modules.loss import linear_cross_entropy as loss_module
from wmtp_modules.memory.step import RECIPES, load_recipe
from wmtp_modules.models.attention_mask import block_mask
from wmtp_modules.models.lora import LoRA
from wmtp_modules.run import model

RECIPE_NAMES = ("rho1_wmtp_distributed", "critic_wmtp_distributed")
LENGTHS = ([[40, 24], [10, 30, 24]], [[64], [5, 59]], [[31, 33], [32, 32]])


@pytest.fixture(scope="module")
def recipes():
    return {name: load_recipe(RECIPES / f"{name}.py") for name in RECIPE_NAMES}


@pytest.fixture
def cfg(tiny_model_args, tmp_path):
    """What a recipe reads to set up its model: two trunk blocks and four heads."""
    return OmegaConf.create(
        {
            "output_dir": str(tmp_path),
            "dtype": "fp32",
            "fp32_master_weights": True,
            "seed": 0,
            "model": {"_component_": "wmtp_modules.models.mtp_llama2", **tiny_model_args},
            "checkpointer": None,
            "weighting": {"name": "uniform"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.001},
            "num_warmup_steps": 0,
            "max_steps": 10,
            "gradient_accumulation_steps": 1,
            "collective_timeout_s": 60,
            "activation_checkpointing": "none",
            "compile": True,
        }
    )


@torch.compiler.disable(recursive=False)  # as torchtune's own
def flex_stand_in(q, k, v, block_mask):
    at = torch.arange(q.shape[2])
    rows = torch.arange(len(q))[:, None, None]
    mask_BTT = block_mask.mask_mod(rows, 0, at[:, None], at[None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTT[:, None])


def mask_of(lengths):
    """As ``document_mask`` makes it on CUDA."""
    docs = [torch.arange(len(one)).repeat_interleave(torch.tensor(one)) for one in lengths]
    return block_mask(torch.stack(docs))


@pytest.fixture
def flex(monkeypatch):
    monkeypatch.setattr(attention_utils, "_SUPPORTS_FLEX_ATTENTION", True)
    monkeypatch.setattr(attention_utils, "BlockMask", BlockMask, raising=False)
    monkeypatch.setattr(
        attention_utils, "compile_friendly_flex_attention", flex_stand_in, raising=False
    )


@pytest.fixture
def runs(monkeypatch):
    """How often each graph ran that ``torch.compile`` made, by its number."""
    runs, numbers = Counter(), count()

    def backend(graph, inputs):
        number, compiled = next(numbers), aot_eager(graph, inputs)
        runs[number] = 0

        def run(*args):
            runs[number] += 1
            return compiled(*args)

        return run

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **args: compile_(f, **args, backend=backend))
    torch._dynamo.reset()
    loss_module._pick.cache_clear()
    yield runs
    torch._dynamo.reset()
    loss_module._pick.cache_clear()


def set_up(recipe, cfg, **changes):
    """The recipe's own model."""
    cls = next(x for name, x in vars(recipe).items() if name.endswith("RecipeDistributed"))
    mesh = init_device_mesh("cpu", (1,))
    one = cls(OmegaConf.merge(cfg, changes), torch.device("cpu"), mesh, None)
    one.setup_model()
    return one._model


def losses_of(model, lengths):
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(512, (2, 64), generator=generator)
    labels_BTK = torch.randint(512, (2, 64, 4), generator=generator)
    return model(tokens_BT, labels_BTK, mask=mask_of(lengths))


def step(model, lengths):
    """Losses and gradients of a step."""
    losses_BTK = losses_of(model, lengths)
    losses_BTK.sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return losses_BTK.detach(), grads


@pytest.mark.usefixtures("flex", "gloo_group")
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(RECIPE_NAMES[0], False), (RECIPE_NAMES[0], True), (RECIPE_NAMES[1], True)],
)
def test_every_block_is_compiled_under_a_block_mask(recipes, cfg, runs, name, checkpointing):
    """Blocks are of one class and share their graphs, so each graph runs once for each block."""
    changes = {"activation_checkpointing": "full" if checkpointing else "none"}
    model = set_up(recipes[name], cfg, **changes)
    eager = set_up(recipes[name], cfg, compile=False)
    assert model.output.loss_impl == "compiled"
    model.output.loss_impl = "chunked"  # only the graphs of blocks are counted here
    n_blocks = len(model.layers) + len(model.heads)
    of_a_step = None
    for lengths in LENGTHS:
        runs.clear()
        losses, grads = step(model, lengths)
        # Before and after the attention; the backward of checkpointing runs the forward again.
        assert len(runs) >= 2
        assert set(runs.values()) == {n_blocks * (1 + checkpointing)}
        # Other documents, or validation in between, need no other graphs: after eight of them
        # Dynamo would leave the block eager.
        assert dict(runs) == (of_a_step or runs)
        of_a_step = dict(runs)
        torch.testing.assert_close((losses, grads), step(eager, lengths))
        runs.clear()
        model.eval()
        with torch.no_grad():
            losses_of(model, lengths)
        model.train()
        assert len(runs) >= 2
        assert set(runs.values()) == {n_blocks}


@pytest.mark.usefixtures("gloo_group")
def test_compiled_and_checkpointed_blocks_keep_the_names_of_their_parameters(recipes, cfg):
    """What is saved is read by runs with other settings."""
    recipe = recipes[RECIPE_NAMES[0]]
    plain = set_up(recipe, cfg, compile=False).state_dict().keys()
    for checkpointing in ("none", "selective", "full"):
        model = set_up(recipe, cfg, activation_checkpointing=checkpointing)
        assert model.state_dict().keys() == plain


def test_an_empty_block_of_lora_is_one_of_defaults(cfg):
    assert model.lora_of(cfg) is None
    cfg.lora = {}
    assert model.lora_of(cfg) == LoRA(rank=16, alpha=32.0, targets="all-linear")
    cfg.update({"lora": {"targets": ["w2"]}, "checkpointer": {"checkpoint_dir": "base"}})
    assert model.lora_of(cfg) == LoRA(targets=("w2",), base="base")


def test_a_model_that_does_not_fit_in_memory_is_one_sentence(monkeypatch):
    """Of 128 GiB, as a mistyped width asks for."""

    def instantiate(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2**37"
        )

    monkeypatch.setattr(model.config, "instantiate", instantiate)
    cfg = OmegaConf.create({"dtype": "fp32", "checkpointer": None, "model": {}})
    for make in (lambda: model.make_model(cfg, None, None), lambda: model.frozen_model(cfg, None)):
        with pytest.raises(ValueError, match="out of memory while the model was made, before any"):
            make()
    monkeypatch.setattr(model.config, "instantiate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.frozen_model(cfg, None)
