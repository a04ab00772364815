"""Rules about keys that depend on each other, for every recipe that trains.

Each is a function whose parameters are named after keys and that returns what is wrong, or None;
see ``check_config``.
"""

import importlib.util
import os
import shutil
from typing import Literal

from omegaconf import DictConfig

STAGES = ("rewards", "critic", "values", "policy")  # of the critic's recipe

Waits = Literal["nothing", "replicas", "all"]  # of gradients, for the last micro-batch of a step


def cpp_compiler() -> str | None:
    """The compiler that ``torch.compile`` calls on a CPU: the one of $CXX, else g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def shards_of(data_parallel_shard: int | None, world: int) -> int:
    """Ranks that a model is sharded over; None and -1 are all of them.

    Raises:
        ValueError: if they do not divide the ranks into groups of that size.
    """
    shards = world if data_parallel_shard in (None, -1) else data_parallel_shard
    if shards < 1 or world % shards:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"data_parallel_shard: {shards} does not divide {world} rank{'s' * (world > 1)}: take "
            f"one of {divisors}, most often the GPUs of one node, or null for all ranks"
        )
    return shards


def what_waits(cfg: DictConfig | dict, world: int) -> Waits:
    """What of the gradients is not sent to other nodes before the last micro-batch of a step."""
    is_sharded = cfg.get("fp32_master_weights", True)
    if not is_sharded or cfg["gradient_accumulation_steps"] == 1 or cfg.get("sync_each_batch"):
        return "nothing"
    if shards_of(cfg.get("data_parallel_shard"), world) < world:
        return "replicas"  # which takes no memory, and so is the default
    return "nothing" if cfg.get("sync_each_batch") is None else "all"


def checkpointing_of(cfg: DictConfig | dict) -> Literal["none", "selective", "full", "auto"]:
    """What is recomputed, by either key's name."""
    older = "full" if cfg.get("enable_activation_checkpointing") else "none"
    return cfg.get("activation_checkpointing") or older


def set_checkpointing(how: str) -> dict[str, str | None]:
    """What to merge into a config to have it so, by whatever name it was set."""
    return {"activation_checkpointing": how, "enable_activation_checkpointing": None}


def _checkpointing_is_said_once(
    activation_checkpointing: str | None, enable_activation_checkpointing: bool | None
) -> str | None:
    if activation_checkpointing is not None and enable_activation_checkpointing is not None:
        return (
            "enable_activation_checkpointing: is the older name of activation_checkpointing, which "
            f"is {activation_checkpointing}: leave it out"
        )
    return None


def _split_once(dataset: dict, dataset_val: dict) -> str | None:
    """Two hashes of one source do not divide it: rows would be on both sides."""
    if dataset.get("source") != dataset_val.get("source") or dataset.get("source") is None:
        return None
    defaults = {"validation_fraction": 0.0, "seed": 0}
    ours, theirs = ({**defaults, **one} for one in (dataset, dataset_val))
    differing = [key for key in defaults if ours[key] != theirs[key]]
    if theirs["validation_fraction"] and differing:
        told = " and ".join(f"{key} ({ours[key]} and {theirs[key]})" for key in differing)
        return (
            f"dataset_val: divides the source of dataset with another {told}, so that rows would "
            "be on both sides: give both the same"
        )


def _compiler_is_there(compile: bool, device: str, optimizer: dict) -> str | None:
    component = str(optimizer.get("_component_"))
    is_compiled = component.startswith("torchao.optim")  # whatever ``compile`` says
    if (compile or is_compiled) and device == "cpu" and cpp_compiler() is None:
        key, off = (
            ("compile: true", "set compile: false")
            if compile
            else (f"optimizer: {component}", "take one of torch.optim")
        )
        return (
            f"{key} needs a C++ compiler on a CPU and {os.environ.get('CXX', 'g++')!r} is not "
            f"there: install g++, name another one in the environment variable CXX, or {off}"
        )


def _bf16_parameters_learn(fp32_master_weights: bool, optimizer: dict) -> str | None:
    if fp32_master_weights:
        return None
    if not optimizer.get("bf16_stochastic_round"):
        return (
            "fp32_master_weights: false loses most updates of bf16 parameters: take an optimizer "
            "with bf16_stochastic_round: true (torchao.optim), or keep fp32 masters"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return (
            "fp32_master_weights: false is for one rank: torchao 0.15 cannot round sharded "
            "parameters stochastically; keep fp32 masters, which are sharded over the ranks"
        )


def _lora_has_a_base(
    lora: dict | None, checkpointer: dict | None, registry: dict | None
) -> list[str]:
    if lora is None:
        return []
    targets, wrong = lora.get("targets"), []
    if not checkpointer:
        wrong.append(
            "lora: adapters need a trained model below them: set checkpointer, or lora: null"
        )
    if isinstance(targets, list) and not 0 < len({*targets}) == len(targets):
        wrong.append(f"lora.targets: must be some layers, each once, or all-linear, got {targets}")
    if lora.get("save_adapter_only") and (registry or {}).get("model_name"):
        wrong.append(
            "lora.save_adapter_only: registry.model_name registers whole models: set it to false, "
            "or model_name to null"
        )
    return wrong


def _float8_trains_all(float8: str | None, lora: dict | None) -> str | None:
    if float8 and lora is not None:
        return "float8: adapters are trained in the compute dtype: set float8 or lora to null"
    return None


def _extra_heads_have_what_they_need(
    extra_heads: str | None, checkpointer: dict | None, lora: dict | None
) -> list[str]:
    wrong = []
    if extra_heads == "only" and not checkpointer:
        wrong.append(
            "extra_heads: only trains nothing but heads 1 to K - 1, on a model that is there: set "
            "checkpointer, or extra_heads: full"
        )
    if extra_heads == "only" and lora is not None:
        wrong.append(
            "extra_heads: only trains these heads whole, and adapters would train the trunk as "
            "well: set lora: null, or extra_heads: isolated with lora"
        )
    if extra_heads == "isolated" and lora is not None and not lora.get("heads", True):
        wrong.append(
            "extra_heads: isolated trains heads 1 to K - 1 beside the rest, and lora.heads: false "
            "leaves them as they are: set lora.heads: true, or extra_heads: full"
        )
    return wrong


def _shards_divide_ranks(data_parallel_shard: int | None) -> str | None:
    if "WORLD_SIZE" in os.environ:  # else it is checked where the number of ranks is known
        try:
            shards_of(data_parallel_shard, int(os.environ["WORLD_SIZE"]))
        except ValueError as error:
            return str(error)
    return None


TRAINING_RULES = (
    _checkpointing_is_said_once,
    _split_once,
    _compiler_is_there,
    _bf16_parameters_learn,
    _lora_has_a_base,
    _float8_trains_all,
    _extra_heads_have_what_they_need,
    _shards_divide_ranks,
)


# ------------------------------------------------------------------ of the critic's recipe


def _stages_in_order(stages: list) -> str | None:
    if not stages or stages != [stage for stage in STAGES if stage in stages]:
        return f"stages: {stages} must be some of {', '.join(STAGES)}, in that order"


def _threshold_has_rewards(policy_rewards_above: float | None, rewards: dict | None) -> str | None:
    if policy_rewards_above is not None and not rewards:
        return "policy_rewards_above: there are no rewards without the block rewards"


def _reward_source_is_there(rewards: dict | None) -> str | None:
    if not rewards:
        return None
    is_model, folder = rewards["source"] == "reward_model", rewards.get("checkpointer")
    if is_model and importlib.util.find_spec("transformers") is None:
        return (
            "rewards.source: reward_model needs transformers: `uv sync --extra reward`, or "
            "`pip install wmtp[reward]`"
        )
    if is_model and not folder:
        return "rewards.checkpointer: missing, source reward_model needs it"
    if not is_model and folder:
        return f"rewards.checkpointer: source {rewards['source']} reads no model"


def _head_fits_objective(critic: dict | None) -> str | None:
    if critic and critic.get("objective") == "pairs" and critic.get("head"):
        return (
            f"critic.head: {critic['head']} is for objective bce: leave it out with pairs, whose "
            "evidence adds up"
        )
    return None


CRITIC_RULES = (
    _head_fits_objective,
    _stages_in_order,
    _threshold_has_rewards,
    _reward_source_is_there,
)
