"""What is said when memory runs out, and the estimates in it; the proof is in benchmarks/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from wmtp_modules import doctor, estimate_memory
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.config.rules import checkpointing_of
from wmtp_modules.estimate_memory import main
from wmtp_modules.memory import step as step_memory
from wmtp_modules.memory.step import Estimate, estimate_trunk, load_recipe, recipe_of
from wmtp_modules.run.out_of_memory import (
    helpful_settings,
    is_out_of_memory,
    out_of_memory_sentence,
)

ROOT = Path(__file__).parents[2]
TRAINING_CONFIGS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if "optimizer" in OmegaConf.load(path)
]
MIB = 2**20
MY_KEY = ("class Config(TrainingKeys):\n", "class Config(TrainingKeys):\n    mine: int\n")
ROUNDS = ("optimizer._component_=torchao.optim.AdamW8bit", "~optimizer.fused")
ROUNDS += ("optimizer.bf16_stochastic_round=true",)


@pytest.fixture(scope="module")
def recipes():
    """Our two training recipes, by file name."""
    return {path.name: load_recipe(path) for path in step_memory.RECIPES.glob("*_wmtp_*.py")}


@pytest.fixture
def estimate_step(recipes):
    return lambda cfg, ranks: step_memory.estimate_step(cfg, ranks, recipes[recipe_of(cfg).name])


@pytest.fixture
def cfg(tiny_model_args, tmp_path):
    """A small model whose activations still take more than its parameters."""
    args = tiny_model_args | {"vocab_size": 2048, "embed_dim": 64, "max_seq_len": 256}
    args |= {"num_layers": 3, "n_future_tokens": 2}
    return OmegaConf.create(
        {
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "dtype": "fp32",
            "fp32_master_weights": True,
            "seed": 0,
            "model": {"_component_": "wmtp_modules.models.mtp_llama2", **args},
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": "tokenizer.model",
                "max_seq_len": 128,
            },
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "weighting": {"name": "uniform"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.001, "fused": True},
            "clip_grad_norm": 1.0,
            "activation_checkpointing": "none",
            # Of no matter to memory.
            "resume_from_checkpoint": False,
            "checkpointer": None,
            "dataset": {"_component_": "wmtp_modules.data.rows_dataset", "source": "a.jsonl"},
            "dataset_val": {"_component_": "wmtp_modules.data.rows_dataset", "source": "b.jsonl"},
            "num_warmup_steps": 2,
            "max_steps": 10,
            "run_val_every_n_steps": 10,
            "save_every_n_steps": 10,
            "keep_last": 1,
            "max_skipped_steps": 1,
            "collective_timeout_s": 60,
            "log_every_n_steps": 1,
            "compile": False,
            "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
            "profiler": {"enabled": False},
        }
    )


def parameter_bytes(cfg):
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------- estimates


def test_parts_are_those_of_the_definition(cfg, estimate_step):
    estimate = estimate_step(cfg, 1)
    parameters = parameter_bytes(cfg)
    assert estimate.peak == sum(estimate.parts.values())
    # AdamW keeps two numbers for each, and a step count of 4 bytes for each tensor.
    assert parameters <= estimate.parts["parameters"] < parameters + 0.2 * MIB  # RoPE's tables
    assert 2 * parameters <= estimate.parts["optimizer state"] < 2 * parameters + 1000


def test_every_setting_that_is_said_to_help_does(cfg, estimate_step):
    now = estimate_step(cfg, 1).peak
    for name, (change, ranks) in helpful_settings(cfg, 1).items():
        assert estimate_step(OmegaConf.merge(cfg, change), ranks).peak < now, name


def test_what_else_a_step_depends_on(cfg, estimate_step):
    now = estimate_step(cfg, 1)
    deeper = estimate_step(OmegaConf.merge(cfg, {"model": {"num_layers": 4}}), 1)
    assert deeper.peak > now.peak
    # The forward meets the gradients of the micro-steps before.
    accumulated = estimate_step(OmegaConf.merge(cfg, {"gradient_accumulation_steps": 2}), 1)
    assert accumulated.peak >= now.peak + 0.9 * parameter_bytes(cfg)
    # Weights known beforehand keep the gradient of the output layer from the forward on.
    waiting = estimate_step(OmegaConf.merge(cfg, {"weighting": {"name": "top_loss"}}), 1)
    assert waiting.peak < now.peak


def test_shards_and_gradients_that_wait(cfg, estimate_step):
    """A replica of two ranks holds twice what four do; what waits unsharded lies there whole."""
    cfg.update({"gradient_accumulation_steps": 2, "batch_size": 1})
    cfg.tokenizer.max_seq_len = 2  # so that parameters are what matters
    model, kept = parameter_bytes(cfg), ("parameters", "optimizer state")

    def estimate(**changes):
        found = estimate_step(OmegaConf.merge(cfg, changes), 4)
        return found.peak, sum(found.parts[part] for part in kept), found.parts["gradients"]

    all_peak, all_kept, all_grads = estimate(sync_each_batch=True)
    two_peak, two_kept, _ = estimate(data_parallel_shard=2, sync_each_batch=True)
    assert two_kept - all_kept == pytest.approx(3 * model / 4, rel=0.05)
    # Sums over shards wait in place of gradients; the largest unit's meets both for a moment.
    waiting_peak, *_ = estimate(data_parallel_shard=2)
    assert two_peak <= waiting_peak < two_peak + 0.3 * model
    # Whole gradients in place of a quarter; heads and output are gathered in any case.
    whole_peak, _, whole_grads = estimate(sync_each_batch=False)
    assert whole_grads - all_grads == pytest.approx(0.75 * model, rel=0.05)
    assert 0.4 * model < whole_peak - all_peak < 1.75 * model
    told = helpful_settings(OmegaConf.merge(cfg, {"sync_each_batch": False}), 4)
    assert "sync_each_batch=true" in told
    assert "8 ranks" in told
    told = helpful_settings(OmegaConf.merge(cfg, {"data_parallel_shard": 2}), 4)
    assert "data_parallel_shard=null" in told
    assert "8 ranks" not in told


def test_logits_are_held_once_while_the_loss_is_made(cfg, estimate_step):
    """Where there is one chunk of them: exponentials and gradients take their place."""
    cfg.update({"batch_size": 1})
    cfg.model.vocab_size = 2**15
    logits = 4 * 2 * 128 * 2**15  # fp32, heads, tokens
    assert logits <= estimate_step(cfg, 1).parts["activations and logits"] < 1.5 * logits


def test_a_gpu_lets_a_chunk_of_logits_go_before_the_next(cfg, estimate_step, monkeypatch):
    """Of two chunks one is held in fp32, beside its gradient rounded to bf16 and the weight's."""
    cfg.update({"batch_size": 1, "device": "cuda", "dtype": "bf16"})
    cfg.model.vocab_size = 2**15
    chunk = 128 * 2**15  # of heads x tokens
    monkeypatch.setattr(step_memory.loss_module, "CHUNK_LOGITS_CUDA", chunk)
    activations = estimate_step(cfg, 1).parts["activations and logits"]
    most = (4 + 2) * chunk + 4 * 64 * 2**15
    assert most <= activations < most + 3 * chunk  # a second one would be 4


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "more"),
    [(2**15, 256, 64 * MIB), (2**9, 1024, -4 * MIB)],
    ids=["larger chunks of logits", "no dense mask"],
)
def test_what_differs_on_a_gpu(cfg, vocab_size, seq_len, more, estimate_step):
    cfg.batch_size, cfg.tokenizer.max_seq_len = 4, seq_len
    cfg.model.vocab_size, cfg.model.max_seq_len = vocab_size, seq_len
    on_cpu = estimate_step(cfg, 1).peak
    on_gpu = estimate_step(OmegaConf.merge(cfg, {"device": "cuda"}), 1).peak
    assert on_gpu > on_cpu + more if more > 0 else on_gpu <= on_cpu + more


def test_bf16_parameters_of_one_rank_are_not_sharded(cfg, estimate_step):
    cfg.update({"dtype": "bf16", "fp32_master_weights": False, "batch_size": 1})
    cfg.tokenizer.max_seq_len = 2  # so that a step of the optimizer, taken eagerly, would show
    cfg.optimizer = {
        "_component_": "torchao.optim.AdamW8bit",
        "lr": 0.001,
        "bf16_stochastic_round": True,
    }
    parts = estimate_step(cfg, 1).parts
    parameters = parameter_bytes(cfg) / 2
    assert parts["gathered parameters"] == 0
    assert parameters <= parts["parameters"] < parameters + 0.2 * MIB
    assert parameters < parts["optimizer state"] < 1.2 * parameters  # 2 bytes and scales


def test_an_update_on_a_gpu_goes_through_all_parameters_at_once(cfg, estimate_step):
    cfg.update({"optimizer": {"_component_": "torch.optim.AdamW"}, "batch_size": 1})
    cfg.tokenizer.max_seq_len = 2
    on_cpu = estimate_step(cfg, 1)
    on_gpu = estimate_step(OmegaConf.merge(cfg, {"device": "cuda"}), 1)
    assert on_gpu.where == "optimizer"
    assert on_gpu.peak > on_cpu.peak + 0.2 * MIB


@pytest.mark.parametrize(("ranks", "quantize"), [(1, False), (1, True), (2, True)])
def test_adapters_on_a_frozen_base(cfg, estimate_step, ranks, quantize):
    """NF4 is whole on each rank: 4 bits, 8 of a scale for 64, 32 of a scale's scale for 16384."""
    cfg.model.update({"embed_dim": 128, "num_kv_heads": 4, "intermediate_dim": 512})
    cfg.update({"batch_size": 1, "gradient_accumulation_steps": 2})
    cfg.lora = {"rank": 8, "targets": ["q_proj", "w1"], "quantize_base": quantize}
    linear = 3 * (128 * 128 + 128 * 512)  # adapted, of three blocks
    adapters = 4 * 3 * 8 * (128 + 128 + 128 + 512)
    rest = parameter_bytes(cfg) - 4 * linear
    base = linear * (0.5 + 1 / 64 + 4 / 16384) if quantize else 4 * linear
    parts = estimate_step(cfg, ranks).parts
    want = base + (rest + adapters) / ranks
    assert want <= parts["parameters"] < want + 0.3 * MIB  # RoPE's tables
    assert adapters / ranks <= parts["gradients"] < adapters + 1000  # of the micro-steps before
    assert 2 * adapters / ranks <= parts["optimizer state"] < 2 * adapters / ranks + 1000


@pytest.mark.parametrize("ranks", [1, 2])
def test_heads_alone_have_gradients_and_state_only_for_themselves(
    cfg, estimate_step, ranks, monkeypatch
):
    """And no masters of what is frozen; distillation holds no more logits than the plain loss."""
    monkeypatch.setattr(step_memory.loss_module, "CHUNK_LOGITS_CPU", 64 * 2048)  # of 256 tokens
    cfg.update({"dtype": "bf16", "gradient_accumulation_steps": 2, "batch_size": 2})
    full, whole = estimate_step(cfg, ranks), parameter_bytes(cfg) / 4
    apart = {"extra_heads": "only"}
    heads = doctor.parameters(OmegaConf.merge(cfg, apart), trained=True)
    assert 0 < heads < whole / 4
    only = estimate_step(OmegaConf.merge(cfg, apart), ranks)
    assert only.peak < 0.9 * full.peak
    kept = 4 * heads / ranks
    want = kept + 2 * (whole - heads) / ranks
    assert want <= only.parts["parameters"] < want + 0.3 * MIB
    assert kept <= only.parts["gradients"] < 3 * kept + 1000
    assert 2 * kept <= only.parts["optimizer state"] < 2 * kept + 1000
    distilled = estimate_step(OmegaConf.merge(cfg, apart, {"distill": {"weight": 0.5}}), ranks)
    assert distilled.peak < 1.05 * only.peak


def test_a_quantised_base_is_among_what_helps(cfg):
    assert not any("lora" in name for name in helpful_settings(cfg, 1))
    cfg.lora = {"rank": 8}
    assert "lora.quantize_base=true" in helpful_settings(cfg, 1)
    cfg.lora.quantize_base = True
    assert not any("lora" in name for name in helpful_settings(cfg, 1))


def test_an_online_reference_is_counted_where_it_is_used(
    cfg, tiny_model_args, monkeypatch, estimate_step
):
    args = tiny_model_args | {"num_layers": 2, "n_future_tokens": 1, "max_seq_len": 128}
    args |= {"vocab_size": 2048}
    monkeypatch.setattr(step_memory, "model_args_from_folder", lambda folder, max_seq_len: args)
    cfg.reference = {"mode": "online", "checkpointer": {"checkpoint_dir": "somewhere"}}
    without = estimate_step(cfg, 1).parts["batch and reference model"]
    cfg.weighting.name = "rho1"
    with_it = estimate_step(cfg, 1).parts["batch and reference model"]
    reference = parameter_bytes(OmegaConf.merge(cfg, {"model": args}))
    assert reference <= with_it - without < reference + 0.2 * MIB


def test_the_critics_policy_and_its_frozen_trunk(cfg, estimate_step):
    """The policy's step is that of any weights known beforehand."""
    uniform = estimate_step(cfg, 1).parts["parameters"]
    cfg.update({"stages": ["policy"], "weighting": {"name": "critic"}})
    cfg.critic = {"objective": "pairs", "batch_size": 4, "checkpoint_dir": "critic"}
    assert estimate_step(cfg, 1).parts["parameters"] == uniform
    trunk = estimate_trunk(cfg)
    assert trunk.parts["optimizer state"] == trunk.parts["gradients"] == 0
    more = OmegaConf.merge(cfg, {"critic": {"batch_size": 32}})
    assert estimate_trunk(more).peak > trunk.peak


# ------------------------------------------------------------------------ copied recipes


@pytest.fixture
def copied(tmp_path):
    """copied(old, new): the Rho-1 recipe with one edit, imported."""

    def make(old, new):
        text = (step_memory.RECIPES / "rho1_wmtp_distributed.py").read_text()
        assert old in text
        path = tmp_path / "mine.py"
        path.write_text(text.replace(old, new, 1))
        return path

    return make


def test_a_copied_recipe_is_estimated_as_it_was_edited(cfg, estimate_step, copied):
    """A loss that keeps another 128 MiB until the backward, and a key of its own."""
    edit = "loss.double() + 0 * (self._optimizer.mine * torch.ones(2**25)).exp().sum()"
    path = copied("        return loss, sums, stats", f"        return {edit}, sums, stats")
    text = path.read_text().replace(*MY_KEY)
    mine = "        self._optimizer.mine = torch.nn.Parameter(torch.ones(()))\n"
    text = text.replace("        self._groups =", f"{mine}        self._groups =")
    path.write_text(text)
    now = estimate_step(cfg, 1).peak
    assert now < 2**26
    mine = load_recipe(path)
    mine.check(OmegaConf.merge(cfg, {"mine": 3}))
    assert step_memory.estimate_step(cfg, 1, mine).peak > 2**27


def test_recipes_that_cannot_be_estimated(copied, tmp_path):
    with pytest.raises(ValueError, match=r"none.py is not a recipe: name a Python file"):
        load_recipe(tmp_path / "none.py")
    with pytest.raises(ValueError, match=r"mine.py cannot be imported: NameError"):
        load_recipe(copied("class Config(TrainingKeys)", "class Config(TrainingKey)"))
    with pytest.raises(ValueError, match="has no class with setup_model, _loss_step and train"):
        load_recipe(copied("def setup_model(self)", "def setup_the_model(self)"))


def test_no_process_group_is_left_behind(cfg, estimate_step):
    cfg.model.num_layers = 1  # no trunk block is left
    with pytest.raises(Exception, match="n_future_tokens 2 must be at least 1 and below"):
        estimate_step(cfg, 2)
    assert not torch.distributed.is_initialized()


# --------------------------------------------------------------------------- the command


@pytest.fixture
def config_file(cfg, tmp_path):
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_accepted(path, recipes):
    cfg = OmegaConf.load(path)
    estimate_memory.check(cfg, 1, recipes[recipe_of(cfg).name])


def test_the_table(config_file, capsys, monkeypatch):
    """Sorted by peak, at most three, and none that does not help."""

    def estimate(cfg, ranks, recipe):
        rows, tokens = cfg.batch_size, cfg.tokenizer.max_seq_len
        step = {"none": 8, "selective": 7, "full": 6}[checkpointing_of(cfg)]
        peak = rows * tokens * (1 + (ranks == 4)) * step
        return Estimate(peak * MIB, "backward", {"parameters": peak * MIB})

    monkeypatch.setattr(estimate_memory, "estimate_step", estimate)
    assert main(["--config", config_file, "--ranks", "2", "batch_size=3", "max_steps=3"]) == 0
    assert capsys.readouterr().out == (
        "Predicted peak of training, one of 2 ranks: 3 rows x 128 tokens, fp32\n"
        "  parameters                                        3.00 GiB\n"
        "  peak                                              3.00 GiB, in the backward\n"
        "A GPU's context, libraries and fragmentation come on top: leave a tenth.\n"
        "\n"
        "What helps most\n"
        "  batch_size=1 gradient_accumulation_steps=3        1.00 GiB\n"
        "  tokenizer.max_seq_len=64                          1.50 GiB\n"
        "  activation_checkpointing=full                     2.25 GiB\n"
    )
    few = ["batch_size=1", "~activation_checkpointing", "enable_activation_checkpointing=true"]
    assert main(["--config", config_file, "--ranks", "2", "--json", *few]) == 0
    found = json.loads(capsys.readouterr().out)
    helps = {"tokenizer.max_seq_len=64": 0.375}  # 4 ranks do not, here
    assert found == {"peak_gib": 0.75, "where": "backward", "helps": helps}


def test_a_model_that_is_read_from_its_folder(
    cfg, tiny_tokenizer_path, tmp_path, capsys, monkeypatch
):
    """It takes what the same model takes whose sizes are typed; without the folder, a sentence."""
    monkeypatch.setattr(estimate_memory, "best_settings", lambda *_: {})
    cfg.model.vocab_size = 512  # the tokenizer's
    model = config.instantiate(cfg.model)
    save_meta(model, tmp_path / "m", tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
    read = OmegaConf.to_container(cfg) | {
        "model": {"_component_": "wmtp_modules.models.mtp_from_checkpoint"},
        "checkpointer": {"checkpoint_dir": str(tmp_path / "m")},
    }
    OmegaConf.save(cfg, tmp_path / "typed.yaml")
    OmegaConf.save(OmegaConf.create(read), tmp_path / "read.yaml")
    peaks = []
    for name in ("typed", "read"):
        file = str(tmp_path / f"{name}.yaml")
        assert main(["--config", file, "--ranks", "2", "--json"]) == 0, capsys.readouterr().err
        peaks.append(json.loads(capsys.readouterr().out)["peak_gib"])
    assert peaks[0] == peaks[1] > parameter_bytes(cfg) / 2**30
    none = str(tmp_path / "none")
    assert main(["--config", str(tmp_path / "read.yaml"), f"checkpointer.checkpoint_dir={none}"])
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert none in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch_sise=4"], r"batch_sise: unknown key \(did you mean 'batch_size'\?\)"),
        (["rows=4"], r"rows: unknown key \(known: "),
        (["optimizer.learning_rte=4"], r"optimizer.learning_rte: unknown key \(did you mean 'lr'"),
        (["batch_size=0"], "batch_size: must be at least 1, got 0"),
        (["~batch_size"], "batch_size: missing"),
        (["--ranks", "0"], "--ranks: must be at least 1, got 0"),
        (
            ["--ranks", "2", "fp32_master_weights=false", *ROUNDS],
            "fp32_master_weights: false is for one rank: give --ranks 1 or keep them",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(config_file, capsys, arguments, message):
    assert main(["--config", config_file, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"ConfigError: {message}.*\n", printed.err)


def test_a_copied_recipe_has_keys_of_its_own(cfg, config_file, copied, capsys, monkeypatch):
    few = Estimate(MIB, "backward", {"parameters": MIB})
    monkeypatch.setattr(estimate_memory, "estimate_step", lambda *_: few)
    OmegaConf.save(OmegaConf.merge(cfg, {"mine": 3}), config_file)
    assert main(["--config", config_file]) == 1
    assert "mine: unknown key" in capsys.readouterr().err
    path = copied(*MY_KEY)
    assert main(["--config", config_file, "--recipe", str(path)]) == 0


# ---------------------------------------------------------------------- out of memory


def test_the_cpu_allocators_error_is_one():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_out_of_memory(error, verdict):
    assert is_out_of_memory(error) is verdict


def test_what_is_set_already_is_not_advised(cfg):
    assert list(helpful_settings(cfg, 2)) == [
        "activation_checkpointing=selective",
        "activation_checkpointing=full",
        "batch_size=4 gradient_accumulation_steps=2",
        "tokenizer.max_seq_len=64",
        "4 ranks",
    ]
    cfg.update({"activation_checkpointing": "full", "batch_size": 1})
    assert list(helpful_settings(cfg, 2)) == ["tokenizer.max_seq_len=64", "4 ranks"]
    cfg.update({"batch_size": 3, "reference": {"mode": "online"}, "fp32_master_weights": False})
    assert list(helpful_settings(cfg, 1)) == [
        "batch_size=1 gradient_accumulation_steps=3",
        "tokenizer.max_seq_len=64",
        "reference.mode=cached",
    ]


def test_the_sentence_when_memory_ran_out(cfg):
    args = {"n_future_tokens": 2, "vocab_size": 2048}
    assert out_of_memory_sentence(cfg, args, ranks=2, peak_gib=1.25) == (
        "out of memory in a step of 8 rows x 128 tokens x 2 heads on each of 2 ranks (vocabulary "
        "2048, fp32); the peak so far is 1.2 GiB. What needs less: "
        "activation_checkpointing=selective; activation_checkpointing=full; "
        "batch_size=4 gradient_accumulation_steps=2; tokenizer.max_seq_len=64; 4 ranks. "
        "`python -m wmtp_modules.estimate_memory --config "
        f"{cfg.output_dir}/config.yaml --ranks 2` predicts the peak of each, and of others with "
        "key=value"
    )


@pytest.mark.nightly
def test_a_prediction_is_within_15_percent_of_what_a_run_takes():
    command = [sys.executable, "benchmarks/memory_estimate.py", "--rows", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "PASS: every row within 15%" in run.stdout
