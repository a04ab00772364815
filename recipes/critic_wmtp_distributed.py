"""Critic-weighted fine-tuning of a multi-token-prediction model with FSDP2, on one rank or many.

    tune run --nproc_per_node 8 recipes/critic_wmtp_distributed.py --config configs/critic/7b.yaml

Four stages, each done once and then found done by its fingerprint:

    rewards  one number per response: a reward model's, a column's, or verified labels
    critic   a value head on the frozen trunk learns which responses are good, and has to show it
    values   V after every token of the data set
    policy   the model is fine-tuned with weights from generalised advantages
             (Schulman et al. 2016, arXiv 1506.02438)

The same file trains the controls. Copy it and edit it: nothing imports it.

Shapes: B packed rows, T positions, K heads. Head k at position t predicts token t + k + 1. V[t] is
the value after token t, so the value before token u is V[u - 1].
"""

import hashlib
import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchtune import config, training, utils
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import packed_block_causal_mask
from torchtune.training.metric_logging import MetricLoggerInterface
from tqdm import tqdm

from wmtp_modules.checkpoints.read import check_model, load_into, save_meta
from wmtp_modules.config.check import (
    Above,
    AtLeast,
    Component,
    ConfigError,
    Nullable,
    Optional,
    check_config,
)
from wmtp_modules.critic import pairs as critics
from wmtp_modules.critic.rewards import (
    RewardModel,
    RewardStatistics,
    reward_fingerprint,
    reward_rows,
)
from wmtp_modules.data.packing import PackedDataset, collate
from wmtp_modules.files import new_file
from wmtp_modules.loss.mtp_loss import IGNORE_INDEX, head_alphas, mtp_labels
from wmtp_modules.loss.value_loss import (
    pairwise_loss,
    regression_loss,
    response_mask,
    row_means,
)
from wmtp_modules.memory.explain import explain_out_of_memory
from wmtp_modules.models.mtp_transformer import MTPTransformer
from wmtp_modules.models.value_head import ValueHead
from wmtp_modules.parallel.process_group import (
    all_reduce_sum,
    cast_parameters_,
    init_process_group,
    init_weights_,
    patient_barrier,
    rank_zero_first,
    shard_model,
    share_from_rank_zero,
)
from wmtp_modules.progress import progress_bar
from wmtp_modules.reports.curves import plot_calibration, plot_curves
from wmtp_modules.run.bad_steps import (
    BadSteps,
    bad_gradients,
    bad_rows,
    first_bad_module,
    print_replay,
    row_ids,
    what_is_wrong,
)
from wmtp_modules.run.figures import (
    TrainingError,
    epoch_dataloader,
    heldout_batches,
    heldout_losses,
    noise_sums,
    peak_memory_gib,
    step_metrics,
    to_device,
)
from wmtp_modules.run.metric_logging import JSONLLogger
from wmtp_modules.run.plan import (
    TRAINING_RULES,
    control_runs,
    is_done,
    one_sentence,
    parse,
    print_losses,
    print_places,
    required_runs,
    write_summary,
)
from wmtp_modules.run.resume import (
    check_not_begun,
    check_not_ended,
    check_same_run,
    notes_on_resume,
    packs_per_step,
    random_state,
    resolved,
    resume_schedule_,
    set_random_state,
)
from wmtp_modules.run.stopping import Stopped, StopRequests, clear_exit, exit_code
from wmtp_modules.run.training_state import TrainingStates
from wmtp_modules.run.watchdog import Watchdog
from wmtp_modules.scoring.score_table import (
    ScoreTable,
    compute_scores,
    fingerprint_checkpoint,
    fingerprint_rows,
    fingerprint_tokenizer,
)
from wmtp_modules.weighting.advantage import (
    CriticWeighting,
    advantages,
    check_one_response,
    standardise,
)

log = utils.get_logger("INFO")
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11
# torchtune's RMSNorm takes fp32 activations and a bf16 scale on purpose.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STAGES = ("rewards", "critic", "values", "policy")
SOURCES = ("reward_model", "column", "labels")
FIT_ROWS = 4096  # training rows from which a pairwise critic's scale is fitted
HELDOUT_BATCH = 32  # rows at a time
PAGE_PAIRS = 4  # held-out pairs shown with their weights

OPTIMIZER = Component(
    given=("params",), keys={"lr": Optional(Above(float, 0))}, makes=torch.optim.Optimizer
)

# Every key of a config; what a component takes is read from its signature.
SCHEMA = {
    "output_dir": str,
    "device": ("cuda", "cpu"),
    "dtype": ("bf16", "fp32"),
    "fp32_master_weights": bool,
    "seed": AtLeast(int, 0),
    "stages": list[str],
    "resume_from_checkpoint": bool,
    "model": Component(makes=MTPTransformer),
    "checkpointer": Nullable({"checkpoint_dir": str}),  # null: start from nothing
    "tokenizer": Component(
        keys={"path": str, "max_seq_len": AtLeast(int, 2)}, makes=Llama2Tokenizer
    ),
    "dataset": Component(given=("tokenizer",), makes=Dataset),
    "dataset_val": Component(given=("tokenizer",), makes=Dataset),
    "batch_size": AtLeast(int, 1),  # packed rows of a rank's micro-batch
    "gradient_accumulation_steps": AtLeast(int, 1),
    "rewards": Optional(
        {
            "source": SOURCES,
            "checkpointer": Optional({"checkpoint_dir": str}),  # of a reward model
            "table_dir": str,
            "batch_tokens": AtLeast(int, 1),
        }
    ),
    "critic": Optional(
        {
            "objective": ("regression", "pairwise"),
            "checkpoint_dir": str,
            "optimizer": OPTIMIZER,
            "batch_size": AtLeast(int, 1),  # rows, or pairs of rows, of a rank
            "max_steps": AtLeast(int, 1),
            "eval_every_n_steps": AtLeast(int, 1),
            "patience": AtLeast(int, 1),  # evaluations without a better held-out loss
        }
    ),
    "value_table": Optional({"table_dir": str, "batch_tokens": AtLeast(int, 1)}),
    "allow_uninformative_critic": Optional(bool),
    "policy_rewards_above": Optional(float),  # standardised, 0 if left out; null: all responses
    "auxiliary_value_coef": Optional(AtLeast(float, 0)),  # the value loss beside the policy's
    "auxiliary_value_lr": Optional(Above(float, 0)),
    "weighting": CriticWeighting,
    "optimizer": OPTIMIZER,
    "num_warmup_steps": AtLeast(int, 0),
    "clip_grad_norm": Above(float, 0),
    "max_steps": AtLeast(int, 1),
    "run_val_every_n_steps": AtLeast(int, 1),
    "save_every_n_steps": AtLeast(int, 1),
    "keep_last": AtLeast(int, 1),  # training states
    "max_skipped_steps": AtLeast(int, 1),  # in a row, without an update
    "collective_timeout_s": Above(float, 0),  # a rank that does nothing for longer hangs
    "max_hours": Optional(Above(float, 0)),  # the run saves and ends before
    "replay": Optional(str),  # bad_step/ of a run: look at its last step again, train nothing
    "log_every_n_steps": AtLeast(int, 1),
    "enable_activation_checkpointing": bool,
    "compile": bool,
    "metric_logger": Component(makes=MetricLoggerInterface),
    "profiler": training.setup_torch_profiler,
    # What comes before the run, and beside it for comparison.
    "assets_dir": Optional(str),
    "prepare": Optional(Component()),
    "requires": Optional(list[str]),
    "controls": Optional(list[str]),
}


def check(cfg: DictConfig) -> None:
    """Everything that can be wrong with a config before a process group or a model exists."""
    check_config(cfg, SCHEMA, TRAINING_RULES)
    if "name" not in cfg.weighting:
        raise ConfigError("weighting.name: missing")
    stages = list(cfg.stages)
    if not stages or stages != [stage for stage in STAGES if stage in stages]:
        raise ConfigError(f"stages: {stages}, has to be some of {', '.join(STAGES)} in that order")
    weightings = [
        make_weighting(OmegaConf.merge(cfg, {"weighting": {"name": name}}))
        for name in (cfg.weighting.name, *(cfg.get("controls") or []))
    ]
    aux = cfg.get("auxiliary_value_coef") or 0
    weighted = any(weighting.needs_scores for weighting in weightings)
    needs_critic = weighted or aux or bool({"critic", "values"} & set(stages))
    for block, needed in (
        ("rewards", needs_critic or "rewards" in stages),
        ("critic", needs_critic),
        ("value_table", weighted or "values" in stages),
    ):
        if needed and cfg.get(block) is None:
            raise ConfigError(f"{block}: missing, the stages and the weighting need it")
    if needs_critic and cfg.checkpointer is None:
        raise ConfigError("checkpointer: null, but a critic needs a trained trunk")
    if cfg.get("policy_rewards_above") is not None and not cfg.get("rewards"):
        raise ConfigError("policy_rewards_above: there are no rewards without the block rewards")
    if cfg.get("rewards"):
        is_model = cfg.rewards.source == "reward_model"
        if is_model and importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                "rewards.source: reward_model needs transformers: `uv sync --extra reward`, or "
                "`pip install wmtp[reward]`"
            )
        if is_model and not cfg.rewards.get("checkpointer"):
            raise ConfigError("rewards.checkpointer: missing, source reward_model needs it")
        if not is_model and cfg.rewards.get("checkpointer"):
            raise ConfigError(f"rewards.checkpointer: source {cfg.rewards.source} reads no model")
    if aux and not cfg.get("auxiliary_value_lr"):
        raise ConfigError("auxiliary_value_coef: the value head needs auxiliary_value_lr with it")


def make_weighting(cfg: DictConfig) -> CriticWeighting:
    return CriticWeighting(**{"seed": cfg.seed, **cfg.weighting})


class CriticWMTPRecipeDistributed:
    """The stages of one run. ``recipe_main`` makes the runs of a config, controls included."""

    def __init__(
        self, cfg: DictConfig, device: torch.device, mesh: DeviceMesh, stops: StopRequests
    ) -> None:
        self._cfg = cfg
        self._device = device
        self._mesh = mesh
        self._stops = stops
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._output_dir = Path(cfg.output_dir)
        self._dtype = DTYPES[cfg.dtype]
        # Masters stay fp32 and compute runs in dtype: at a learning rate of 1e-5 most updates of
        # a bf16 parameter round to nothing. Pure bf16 needs stochastic rounding to be of use.
        self._master_dtype = torch.float32 if cfg.fp32_master_weights else self._dtype
        self._weighting = make_weighting(cfg)
        self._step = 0  # optimizer steps done
        self._micro_step = 0
        self._epoch = 0
        self._best_loss = float("inf")
        self._heldout: dict[str, list[float]] = {}  # "base" before training, "last" since
        self._statistics: tuple[float, float] | None = None  # of the advantages
        self._bad_steps = BadSteps(self._output_dir, cfg.max_skipped_steps)
        self.watchdog = Watchdog(cfg.collective_timeout_s, cfg.output_dir)

    # ---------------------------------------------------------------- setup

    def setup(self) -> None:
        """Data and rewards, which every stage reads."""
        cfg = self._cfg
        training.set_seed(cfg.seed)
        with torch.device("meta"):
            self._model = config.instantiate(cfg.model)
        folder = cfg.checkpointer.checkpoint_dir if cfg.checkpointer else None
        self.model_args = self._model.args
        check_model(self.model_args, cfg.tokenizer.path, cfg.tokenizer.max_seq_len, folder)
        self._alphas_K = head_alphas(self._model.n_future_tokens, self._weighting.decay)
        self._alphas_K = self._alphas_K.to(self._device)

        # Tokenised once by rank 0; the others then read the same cached file.
        self._tokenizer = config.instantiate(cfg.tokenizer)
        with rank_zero_first():
            self._rows = config.instantiate(cfg.dataset, self._tokenizer)
            self._rows_val = config.instantiate(cfg.dataset_val, self._tokenizer)
        if cfg.get("rewards"):
            self._setup_rewards()

    def setup_policy(self) -> None:
        """The model that is fine-tuned, on the responses good enough to learn from."""
        cfg = self._cfg
        _ = self.made_from  # hashes all data on rank 0: not while the watchdog looks
        self._setup_data()
        self._setup_model()
        groups = [
            {"params": [p for n, p in self._model.named_parameters() if "value_head" not in n]}
        ]
        if self._auxiliary:
            value_parameters = list(self._model.value_head.parameters())
            groups.append({"params": value_parameters, "lr": cfg.auxiliary_value_lr})
        self._optimizer = config.instantiate(cfg.optimizer, groups)
        self._lr_scheduler = training.get_cosine_schedule_with_warmup(
            self._optimizer, num_warmup_steps=cfg.num_warmup_steps, num_training_steps=cfg.max_steps
        )
        if cfg.get("replay"):
            self._states = TrainingStates(Path(cfg.replay), keep_last=1)
            self._resume()
            if self._states.last_step is None:
                raise ValueError(f"replay: {cfg.replay} holds no state, name a run's bad_step")
        else:
            self._states = TrainingStates(self._output_dir / "training_state", cfg.keep_last)
            run_id = self._resume() if cfg.resume_from_checkpoint else None
            if self._states.last_step is None:  # what lies there is another run's
                self._states.drop_all()
            self._setup_loggers(run_id)

    def _setup_model(self) -> None:
        cfg = self._cfg
        if not cfg.checkpointer:
            # From nothing (the quickstart's models): made whole and equal on all ranks.
            self._model = config.instantiate(cfg.model)
            init_weights_(self._model, cfg.seed)
        cast_parameters_(self._model, self._master_dtype)
        if self._auxiliary:  # inside the sharded model, or its gradients are not reduced
            with torch.device("meta"):
                self._model.value_head = ValueHead(self._model.args["embed_dim"])
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(
                self._model, auto_wrap_policy={TransformerSelfAttentionLayer}
            )
        if cfg.compile:
            for block in (*self._model.layers, *self._model.heads):
                block.compile()
            self._model.output.loss_impl = "compiled"
        if cfg.fp32_master_weights:
            shard_model(self._model, self._mesh, compute_dtype=self._dtype)
        elif not cfg.checkpointer:  # one rank, nothing to shard or to cast
            self._model.to(self._device)
        if cfg.checkpointer:
            load_into(self._model, cfg.checkpointer.checkpoint_dir, device=self._device)
        if self._auxiliary:
            state = self._load_value_head().state_dict()
            whole = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self._model.value_head, state, options=whole)
        self._model.train()

    def _policy_rows(self) -> tuple[Dataset, np.ndarray | None, Dataset]:
        """Rows that train the policy, which ones they are, and the held-out ones of their kind."""
        if not self._cfg.get("rewards"):
            return self._rows, None, self._rows_val
        threshold = self._cfg.get("policy_rewards_above", 0.0)  # only good ones, unless asked
        threshold = -np.inf if threshold is None else threshold
        chosen = np.flatnonzero(self._rewards > threshold)
        chosen_val = np.flatnonzero(self._rewards_val > threshold)
        if not len(chosen) or not len(chosen_val):
            raise ValueError(
                f"policy_rewards_above {threshold} leaves {len(chosen)} training and "
                f"{len(chosen_val)} held-out responses: lower it (rewards are standardised)"
            )
        return self._rows.select(chosen), chosen, self._rows_val.select(chosen_val)

    def _setup_data(self) -> None:
        rows, chosen, rows_val = self._policy_rows()
        if chosen is not None:
            log_zero(f"Policy: {len(rows)} of {len(self._rows)} responses.")
        pack = {"max_seq_len": self._cfg.tokenizer.max_seq_len, "seed": self._cfg.seed}
        self._dataset_val = PackedDataset(rows_val, **pack)
        if self._weighting.needs_scores:
            self._dataset = self._valued_packs(rows, chosen)
            self._statistics = self._advantage_statistics(self._dataset, chosen)
        elif chosen is not None:
            self._dataset = PackedDataset(rows, rewards=self._rewards[chosen], **pack)
        else:
            self._dataset = PackedDataset(rows, **pack)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._dataset.set_epoch(self._epoch)
        packs = packs_per_step(self._cfg, self._world)
        self._dataloader = epoch_dataloader(
            self._dataset, self._cfg.batch_size, self._rank, self._world, packs
        )

    def _setup_loggers(self, run_id: str | None) -> None:
        """Rank 0 writes metrics.jsonl always, and to the configured logger besides."""
        cfg = self._cfg
        self._metric_loggers = []
        if self._rank == 0:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            # What an earlier run left here must not look like this one's.
            (self._output_dir / "summary.json").unlink(missing_ok=True)
            clear_exit(self._output_dir)
            self._bad_steps.write_files()
            with new_file(self._output_dir / "config.yaml") as unfinished:
                OmegaConf.save(cfg, unfinished, resolve=True)
            jsonl = JSONLLogger(self._output_dir / "metrics.jsonl", resume_step=self._step)
            known = {"run_id": run_id} if run_id else {}
            self._metric_loggers = [jsonl, config.instantiate(cfg.metric_logger, **known)]
            for logger in self._metric_loggers:
                logger.log_config(cfg)

    def _resume(self) -> str | None:
        """Go on where the newest sound training state stands."""
        folder = self._states.newest()
        if folder is None:
            check_not_ended(self._output_dir)
            log_zero(f"Nothing to resume in {self._output_dir}: starting from step 0.")
            return None
        run = check_same_run(folder, self._cfg, self._world)
        if run["made_from"] != self.made_from:
            raise ValueError(
                f"{folder} was trained on other data, rewards or values than these: start another "
                "run with resume_from_checkpoint: false and another output_dir"
            )
        notes = notes_on_resume(run, self._cfg, self._world, len(self._dataset))
        run, own = self._states.load(folder, self._model, self._optimizer)
        self._step, self._micro_step, self._epoch = run["step"], run["micro_step"], run["epoch"]
        self._best_loss, self._heldout = run["best_loss"], run["heldout"]
        self._statistics = run["statistics"]
        before = run["config"]
        if self._step % before["run_val_every_n_steps"] and self._step != before["max_steps"]:
            self._heldout.pop("last", None)  # it is of an earlier step
        self._bad_steps.load_state_dict(run["bad_steps"])
        resume_schedule_(self._lr_scheduler, run["lr_scheduler"])
        self._start_epoch()
        self._dataloader.load_state_dict(run["dataloader"])
        if run["world"] == self._world:
            set_random_state(own["rng"], self._device)
        log_zero(" ".join([f"Resumed {folder} after step {self._step}.", *notes]))
        return run["run_id"]

    # -------------------------------------------------------------- rewards

    def _setup_rewards(self) -> None:
        """Standardised rewards of both data sets, with the statistics of the training set."""
        raw, raw_val = (
            self._reward_table(rows, split)
            for rows, split in ((self._rows, "train"), (self._rows_val, "heldout"))
        )
        self.__dict__.pop("_reward_model", None)  # leaves the GPU before the trunk comes
        self._reward_statistics = RewardStatistics.of(raw)
        self._rewards = self._reward_statistics.standardise(raw)
        self._rewards_val = self._reward_statistics.standardise(raw_val)
        if "critic" in self._cfg.stages and np.ptp(raw_val) == 0:
            raise ValueError(
                f"dataset_val: every response has reward {raw_val[0]}: a critic is judged on good "
                "and bad responses"
            )

    def _reward_table(self, rows: Dataset, split: str) -> np.ndarray:
        rewards = self._cfg.rewards
        model, folder = rewards.get("checkpointer"), Path(rewards.table_dir) / split
        fingerprint = self._on_rank_zero(
            lambda: reward_fingerprint(
                rows,
                rewards.source,
                max_seq_len=self._cfg.tokenizer.max_seq_len,
                tokenizer_path=self._cfg.tokenizer.path,
                checkpoint_dir=model.checkpoint_dir if model else None,
                dtype=self._cfg.dtype,
            )
        )
        if "rewards" in self._cfg.stages:
            if rewards.source != "reward_model":
                reward_rows(rows, rewards.source)  # all of them are sound
            with self.watchdog:
                compute_scores(
                    folder,
                    fingerprint,
                    rows,
                    self._score_rewards,
                    inputs=self._reward_inputs,
                    batch_tokens=rewards.batch_tokens,
                    rank=self._rank,
                    world=self._world,
                    desc=f"rewards ({split})",
                    beat=self.watchdog.beat,
                )
        return ScoreTable.open(folder, fingerprint, rows).per_row().astype(np.float64)

    def _reward_inputs(self, part: Dataset) -> list:
        if self._cfg.rewards.source == "reward_model":
            return list(zip(part["prompt"], part["response"], strict=True))
        return list(part["reward"])

    def _score_rewards(self, batch: list) -> list[np.ndarray]:
        if self._cfg.rewards.source == "reward_model":
            batch = self._reward_model.score(batch)
        return [np.array([reward], np.float32) for reward in batch]

    @cached_property
    def _reward_model(self) -> RewardModel:
        """Loaded when the first response has to be scored."""
        folder = self._cfg.rewards.checkpointer.checkpoint_dir
        with self.watchdog.paused():
            return RewardModel(folder, device=self._device, dtype=self._dtype)

    # --------------------------------------------------------------- critic

    @cached_property
    def _trunk(self) -> torch.nn.Module:
        """The frozen model, whole on each rank and in compute precision; loaded when needed."""
        with torch.device("meta"):
            model = config.instantiate(self._cfg.model)
        cast_parameters_(model, self._dtype)
        with self.watchdog.paused():
            load_into(model, self._cfg.checkpointer.checkpoint_dir, device=self._device)
        return model.eval().requires_grad_(False)

    def free_trunk(self) -> None:
        """Leave the memory to the policy."""
        self.__dict__.pop("_trunk", None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _critic_fingerprint(self) -> dict:
        """What a critic is made from: another trunk, data set or reward makes another critic."""
        made_from = self._on_rank_zero(
            lambda: {
                "trunk": fingerprint_checkpoint(self._cfg.checkpointer.checkpoint_dir),
                "tokenizer": fingerprint_tokenizer(self._cfg.tokenizer.path),
                "dataset": fingerprint_rows(self._rows),
                "dataset_val": fingerprint_rows(self._rows_val),
                "responses": critics.fingerprint_responses(self._rows),
                "responses_val": critics.fingerprint_responses(self._rows_val),
            }
        )
        rewards = [[*map(float, r)] for r in (self._rewards, self._rewards_val)]
        return made_from | {
            "rewards": hashlib.sha256(json.dumps(rewards).encode()).hexdigest(),
            "objective": self._cfg.critic.objective,
            "dtype": self._cfg.dtype,
        }

    def _critic_settings(self) -> dict:
        """How a critic is trained: of no matter to a policy, but another makes another critic."""
        settings = resolved(self._cfg)["critic"] | {"seed": self._cfg.seed}
        return {key: settings[key] for key in settings if key != "checkpoint_dir"}

    def _critic_items(self) -> tuple[np.ndarray, np.ndarray]:
        """What to train on, [n, 1] rows or [n, 2] pairs, and held-out pairs."""
        cfg = self._cfg
        pairs, lengths = [], []
        for rows, rewards in ((self._rows, self._rewards), (self._rows_val, self._rewards_val)):
            lengths.append(critics.response_lengths(rows))
            problems = critics.problem_ids(rows)
            pairs.append(critics.make_pairs(lengths[-1], rewards, problems, seed=cfg.seed))
        if cfg.critic.objective == "regression":
            return np.flatnonzero(lengths[0])[:, None], pairs[1]
        for name, found in zip(("dataset", "dataset_val"), pairs, strict=True):
            if not len(found):
                raise ValueError(
                    f"{name} has no two responses to one problem of like length and unlike reward: "
                    "the pairwise objective needs good and bad responses with a problem_id; with "
                    "critic.objective: regression a reward is enough"
                )
        return pairs[0], pairs[1]

    def train_critic(self) -> None:
        """Fit the value head on the frozen trunk, keep the best held-out one, judge it."""
        cfg, folder = self._cfg.critic, Path(self._cfg.critic.checkpoint_dir)
        made_from, settings = self._critic_fingerprint, self._critic_settings()
        if critics.read_critic(folder) is not None:
            critics.check_critic(folder, made_from, settings)
            self._check_critic()
            return
        items, pairs_val = self._critic_items()
        torch.manual_seed(self._cfg.seed)  # equal heads on all ranks
        head = ValueHead(self._model.args["embed_dim"]).to(self._device)
        # DDP averages gradients over ranks; the loss is summed first and divided once.
        replica = DistributedDataParallel(head)
        optimizer = config.instantiate(cfg.optimizer, head.parameters())
        joint_size = self._world * cfg.batch_size
        state = critics.TrainingState(folder, made_from | settings | {"joint": joint_size})
        state.resume(head, optimizer)
        bar = progress_bar(
            total=cfg.max_steps, initial=state.step, desc="critic", shown=self._rank == 0
        )
        while state.step < cfg.max_steps and state.evaluations_since_best < cfg.patience:
            self.watchdog.beat(f"the critic's step {state.step + 1}")
            joint = critics.joint_batch(len(items), joint_size, state.step, self._cfg.seed)
            loss, count = self._critic_loss(replica, items[joint[self._rank :: self._world]])
            loss.backward()
            loss, count = all_reduce_sum(loss, count)
            if problem := what_is_wrong({"critic's loss": loss}, count):
                raise TrainingError(
                    f"{problem} in step {state.step + 1}: lower critic.optimizer.lr"
                )
            training.scale_grads(head, self._world / count)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            bar.update()
            if state.step % cfg.eval_every_n_steps == 0 or state.step == cfg.max_steps:
                heldout = self._critic_heldout_loss(head, pairs_val)
                if not math.isfinite(heldout):
                    raise TrainingError(
                        f"the critic's held-out loss after step {state.step} is {heldout}: lower "
                        "critic.optimizer.lr"
                    )
                bar.set_postfix_str(f"loss {float(loss / count):.4f} held-out {heldout:.4f}")
                state.evaluated(heldout, head, optimizer)
        bar.close()
        head.load_state_dict(state.best_head)
        self._finish_critic(head, pairs_val, state)

    def _critic_loss(self, head, items: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and count of the objective over this rank's rows or pairs."""
        flat = items.T.flatten()  # pairs: first the better responses, then the worse ones
        batch = critics.batch_of(self._rows, flat.tolist(), self._device)
        with torch.no_grad():
            hidden_BTD = self._trunk.trunk(batch["tokens"])
        values_BT = head(hidden_BTD)
        if self._cfg.critic.objective == "pairwise":
            better_P, worse_P = row_means(values_BT, batch["y"]).chunk(2)
            return pairwise_loss(better_P, worse_P), values_BT.new_tensor(len(better_P))
        rewards_B = torch.from_numpy(self._rewards[flat]).to(values_BT)
        rewards_BT = rewards_B[:, None].expand_as(values_BT)
        return regression_loss(values_BT, rewards_BT, batch["y"]), batch["y"].sum()

    def _share(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """This rank's part of some rows, in batches."""
        own = indices[self._rank :: self._world]
        batches = (own[i : i + HELDOUT_BATCH] for i in range(0, len(own), HELDOUT_BATCH))
        return self.watchdog.beating(batches, "rows that judge the critic")

    def _sums(self, head: ValueHead, rows: Dataset, indices: np.ndarray) -> np.ndarray:
        """``value_sums`` of some rows, shared out over the ranks."""
        own = critics.sums_of_rows(self._trunk, head, rows, self._share(indices))
        (sums_N3,) = all_reduce_sum(torch.from_numpy(own).to(self._device))
        return sums_N3.cpu().numpy()

    def _critic_heldout_loss(self, head: ValueHead, pairs_val: np.ndarray) -> float:
        sums_N3 = self._sums(head, self._rows_val, np.arange(len(self._rows_val)))
        if self._cfg.critic.objective == "pairwise":
            return critics.pairwise_loss_of(sums_N3, pairs_val)
        return critics.value_loss_of(sums_N3, self._rewards_val)

    def _finish_critic(self, head: ValueHead, pairs_val: np.ndarray, state) -> None:
        """Scale, report, pictures; the record is written last."""
        cfg, folder = self._cfg.critic, Path(self._cfg.critic.checkpoint_dir)
        if cfg.objective == "pairwise":
            rng = np.random.default_rng(self._cfg.seed)
            indices = np.sort(rng.permutation(len(self._rows))[:FIT_ROWS])
            sums_N3 = self._sums(head, self._rows, indices)
            scale, shift = critics.fit_affine(sums_N3[indices], self._rewards[indices])
            head.scale.fill_(scale)
            head.shift.fill_(shift)
        sums_N3 = self._sums(head, self._rows_val, np.arange(len(self._rows_val)))
        report = critics.critic_report(sums_N3, self._rewards_val, pairs_val)
        if "noise" in self._rows_val.column_names:
            bad = self._share(np.flatnonzero(self._rewards_val <= 0))
            found = critics.near_marks_of_rows(
                self._trunk, head, self._rows_val, bad, self._rewards_val
            )
            (found,) = all_reduce_sum(torch.from_numpy(found).to(self._device))
            hits, chance, n_rows = found.tolist()
            if n_rows:
                near = {"share": hits / n_rows, "chance": chance / n_rows, "rows": int(n_rows)}
                report["delta_near_mutation"] = near
        report |= {"steps": state.step, "scale": head.scale.item(), "shift": head.shift.item()}
        if self._rank == 0:
            plot_calibration(
                critics.row_means_of(sums_N3), self._rewards_val, folder / "calibration.png"
            )
            record = {
                "fingerprint": self._critic_fingerprint,
                "settings": self._critic_settings(),
                "report": report,
                "rewards": vars(self._reward_statistics),
                "heldout_losses": state.heldout_losses,
            }
            critics.save_critic(folder, head, record)
        patient_barrier()
        self._check_critic()

    def _check_critic(self) -> dict:
        """The report of the critic, which is this run's and knows something."""
        folder = Path(self._cfg.critic.checkpoint_dir)
        report = critics.check_critic(folder, self._critic_fingerprint)["report"]
        found = critics.shortcomings(report, self._cfg.critic.objective)
        if found and not self._cfg.get("allow_uninformative_critic"):
            raise ValueError(
                f"the critic in {folder} knows nothing of use: {'; and '.join(found)}. Give it "
                "more data or steps, or set allow_uninformative_critic: true"
            )
        return report

    @cached_property
    def made_from(self) -> str:
        """Hash of the data, rewards, critic and values that the policy is trained on."""
        parts = self._on_rank_zero(
            lambda: [fingerprint_rows(self._rows), fingerprint_rows(self._rows_val)]
        )
        if self._cfg.get("rewards"):
            parts += [[*map(float, r)] for r in (self._rewards, self._rewards_val)]
        if self.needs_critic:
            parts.append(self._values_fingerprint)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_policy(self) -> dict:
        """The critic's figures; an error now is one that a control would hide for hours."""
        rows, chosen, _ = self._policy_rows()
        if self._weighting.needs_scores:
            self._valued_packs(rows, chosen)
        return self.critic_summary()

    # --------------------------------------------------------------- values

    @property
    def _auxiliary(self) -> float:
        return self._cfg.get("auxiliary_value_coef") or 0.0

    @property
    def needs_critic(self) -> bool:
        """Whether the policy reads values, or trains the critic's value head on."""
        return self._weighting.needs_scores or bool(self._auxiliary)

    def _load_value_head(self) -> ValueHead:
        self._check_critic()
        folder = Path(self._cfg.critic.checkpoint_dir)
        return critics.load_value_head(folder, self._model.args["embed_dim"])

    @cached_property
    def _values_fingerprint(self) -> dict:
        head_file = Path(self._cfg.critic.checkpoint_dir) / critics.HEAD_FILE
        return {
            "checkpoint": self._critic_fingerprint["trunk"],
            "critic": self._on_rank_zero(lambda: fingerprint_tokenizer(head_file)),
            "tokenizer": self._critic_fingerprint["tokenizer"],
            "dataset": self._critic_fingerprint["dataset"],
            "max_seq_len": self._cfg.tokenizer.max_seq_len,
            "kind": "values",
            "n_heads": 1,
            "dtype": self._cfg.dtype,
        }

    def compute_values(self) -> None:
        """V after every token of the training set, from the frozen trunk and the critic."""
        head = self._load_value_head().to(self._device)
        with self.watchdog:
            compute_scores(
                self._cfg.value_table.table_dir,
                self._values_fingerprint,
                self._rows,
                lambda batch: critics.row_values(self._trunk, head, batch),
                batch_tokens=self._cfg.value_table.batch_tokens,
                rank=self._rank,
                world=self._world,
                desc="values",
                beat=self.watchdog.beat,
            )
        self._write_page(head)

    def _valued_packs(self, rows: Dataset, chosen: np.ndarray) -> PackedDataset:
        """The policy's packs, with values and rewards beside the tokens."""
        self._check_critic()
        table = ScoreTable.open(
            self._cfg.value_table.table_dir, self._values_fingerprint, self._rows
        )
        return PackedDataset(
            rows,
            max_seq_len=self._cfg.tokenizer.max_seq_len,
            seed=self._cfg.seed,
            scores={"values": Subset(table, chosen.tolist())},
            rewards=self._rewards[chosen],
        )

    def _advantage_statistics(
        self, packs: PackedDataset, chosen: np.ndarray
    ) -> tuple[float, float]:
        """Mean and standard deviation of the advantage over all response tokens of the policy."""
        row_of = torch.from_numpy(np.append(chosen, -1))  # padding's row is -1
        sums = torch.zeros(3, dtype=torch.float64)
        indices = range(self._rank, len(packs), self._world)
        for index in progress_bar(indices, desc="advantages", shown=self._rank == 0):
            pack = collate([packs[index]])
            check_one_response(pack["keep"], pack["doc"], row_of[pack["row"]])
            a_BT = self._advantages(pack)
            y_BT = response_mask(pack["keep"], pack["doc"])
            sums += torch.stack([y_BT.sum(), a_BT[y_BT].sum(), a_BT[y_BT].square().sum()])
        (sums,) = all_reduce_sum(sums.to(self._device))
        n, total, square = sums.tolist()
        return total / n, max(square / n - (total / n) ** 2, 0.0) ** 0.5

    def _advantages(self, batch: dict) -> torch.Tensor:
        return advantages(
            batch["values"], batch["reward"], batch["keep"], batch["doc"], lam=self._weighting.lam
        )

    def _write_page(self, head: ValueHead) -> None:
        """A few held-out pairs with every token coloured by its weight; on rank 0."""
        page = Path(self._cfg.critic.checkpoint_dir) / "weights.html"
        threshold = self._cfg.get("policy_rewards_above", 0.0)
        of = f"critic {self._values_fingerprint['critic'][:12]}, policy_rewards_above {threshold}"
        caption = critics.page_caption(self._weighting, of)
        if self._on_rank_zero(lambda: page.exists() and caption in page.read_text("utf-8")):
            return
        _, pairs_val = self._critic_items()
        if not len(pairs_val):
            return
        rows, chosen, _ = self._policy_rows()
        statistics = self._advantage_statistics(self._valued_packs(rows, chosen), chosen)
        if self._rank == 0:
            critics.write_pairs_page(
                page,
                self._trunk,
                head,
                self._rows_val,
                pairs_val[:PAGE_PAIRS],
                self._rewards_val,
                weighting=self._weighting,
                statistics=statistics,
                tokenizer=self._tokenizer,
                caption=caption,
            )

    # ------------------------------------------------------------- training

    def _loss_step(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:
        """Weighted loss of one micro-batch, summed and not yet divided, with its figures."""
        K = self._model.n_future_tokens
        labels_BTK = mtp_labels(batch["tokens"], batch["keep"], batch["doc"], K)
        mask_BTK = labels_BTK != IGNORE_INDEX
        inputs = {
            "mask": packed_block_causal_mask(batch["seq_lens"]),
            "input_pos": batch["input_pos"],
        }
        z_BT = None
        if self._weighting.needs_scores:
            z_BT = standardise(self._advantages(batch), *self._statistics)

        if self._weighting.needs_losses:
            losses_BTK, *values = self._forward(batch, labels_BTK, **inputs)
            weights_BTK, stats = self._weighting(
                losses_BTK, mask_BTK, batch["doc"], None, step=self._micro_step
            )
            loss = (self._alphas_K * weights_BTK * losses_BTK).sum()
        else:  # weights known beforehand go into the forward, which saves a matrix product
            weights_BTK, stats = self._weighting(
                None, mask_BTK, batch["doc"], z_BT, step=self._micro_step
            )
            loss, losses_BTK, *values = self._forward(
                batch, labels_BTK, token_weights_BTK=self._alphas_K * weights_BTK, **inputs
            )

        sums = {
            "n_K": mask_BTK.sum((0, 1)),
            "loss_K": losses_BTK.detach().sum((0, 1)),
            "objective": loss.detach(),
            "value_loss": torch.zeros_like(loss.detach()),
            "tokens": (batch["doc"] >= 0).sum(),
            "noise": noise_sums(batch["noise"], mask_BTK, weights_BTK),
        }
        if self._auxiliary:
            y_BT = response_mask(batch["keep"], batch["doc"])
            value_loss = regression_loss(values[0], batch["reward"], y_BT)
            sums["value_loss"] = value_loss.detach()
            loss = loss + self._auxiliary * value_loss
        return loss, sums, stats

    def _forward(self, batch: dict, labels_BTK: torch.Tensor, **inputs) -> tuple:
        """Loss, losses and, with an auxiliary value loss, values."""
        out = self._model(batch["tokens"], labels_BTK, with_values=bool(self._auxiliary), **inputs)
        return out if isinstance(out, tuple) else (out,)

    def train(self) -> None:
        cfg = self._cfg
        if "base" not in self._heldout:
            self._heldout["base"] = self.validate()
        bar = progress_bar(
            total=cfg.max_steps,
            initial=self._step,
            desc=cfg.weighting.name,
            shown=self._rank == 0,
        )
        batches = self._batches()
        profiler = training.DummyProfiler()
        if cfg.profiler.get("enabled"):
            profiler, _ = training.setup_torch_profiler(**cfg.profiler)
        profiler.start()
        window_tokens, window_start = 0, time.perf_counter()  # since the last logged step
        while self._step < cfg.max_steps:
            self._position = self._where()  # a stop before the update goes on from here
            sums, rows = {}, []
            for _ in range(cfg.gradient_accumulation_steps):
                self.watchdog.beat(f"step {self._step + 1}", self._step)
                self._stops.note_save(self._states.seconds)
                if reason := self._stops.agreed():
                    self._stop(reason)
                batch = next(batches)
                rows.append(batch["row"])
                loss, micro_sums, stats = self._loss_step(batch)
                loss.backward()
                sums = {name: sums.get(name, 0) + value for name, value in micro_sums.items()}
                self._micro_step += 1

            # Sum first, divide once: n' counts the targets of all ranks and micro-batches.
            # FSDP2 averages gradients over ranks, hence the factor world.
            sums["failed_saves"] = loss.new_tensor(self._states.has_failed)
            sums = dict(zip(sums, all_reduce_sum(*sums.values()), strict=True))
            n_prime = (self._alphas_K * sums["n_K"]).sum().clamp(min=1e-6)
            training.scale_grads(self._model, self._world / n_prime)
            # The value head by itself: its gradient must not shrink the policy's step.
            grad_norm, *value_head_norm = [
                torch.nn.utils.clip_grad_norm_(group["params"], cfg.clip_grad_norm)
                for group in self._optimizer.param_groups
            ]
            figures = {"loss": sums["objective"], "value loss": sums["value_loss"]}
            figures |= {"gradient norm": grad_norm}
            if value_head_norm:
                figures["value head's gradient norm"] = value_head_norm[0]
            problem = what_is_wrong(figures, sums["n_K"])
            lr = self._lr_scheduler.get_last_lr()[0]
            if problem:
                self._skip(problem, rows)
            else:
                self._optimizer.step()
                loss = (sums["loss_K"] / sums["n_K"].clamp(min=1)).mean().item()
                self._bad_steps.look_for_spike(self._step + 1, loss, rows)
            self._lr_scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._step += 1
            window_tokens = window_tokens + sums["tokens"]

            if self._step % cfg.log_every_n_steps == 0:
                tokens = float(window_tokens)  # waits for the device, so before the clock is read
                speed = tokens / (time.perf_counter() - window_start)
                self._log_step(bar, sums, stats, grad_norm, lr, speed)
                window_tokens, window_start = 0, time.perf_counter()
            bar.update()
            profiler.step()
            paused = time.perf_counter()
            last = self._step == cfg.max_steps
            if last or self._step % cfg.run_val_every_n_steps == 0:
                self._heldout["last"] = self.validate()
                self._save_best()
            if sums["failed_saves"]:
                self._states.wait()  # raises
            # Not in a row of skipped steps: what is kept shall be from before them.
            if last or (self._step % cfg.save_every_n_steps == 0 and not problem):
                self._position = self._where()
                self.save_checkpoint(self._states)
            window_start += time.perf_counter() - paused
        profiler.stop()
        bar.close()
        if "last" not in self._heldout:  # a run that was cut short to the step of its state
            self._heldout["last"] = self.validate()
            self._save_best()
        self._export("last")
        with self.watchdog.paused():
            self._states.wait()

    def _batches(self) -> Iterator[dict]:
        """Micro-batches on the device, epoch after epoch, each packed in an order of its own."""
        while True:
            for batch in self._dataloader:
                yield to_device(batch, self._device)
            self._epoch += 1
            self._start_epoch()

    def _log_step(self, bar: tqdm, sums: dict, stats: dict, grad_norm, lr, tokens_per_s) -> None:
        """One line of figures; with ``stats`` of the step's last joint micro-batch."""
        metrics = step_metrics(sums, stats, self._alphas_K) | {
            "lr": lr,
            "grad_norm": float(grad_norm),
            "tokens_per_s": tokens_per_s,
            "memory_gib": peak_memory_gib(self._device),
            "skipped_steps": len(self._bad_steps.skipped),
        }
        if self._auxiliary:  # per response token, of which head 0 has one target each
            metrics["value_loss"] = (sums["value_loss"] / sums["n_K"][0]).item()
        for logger in self._metric_loggers:
            logger.log_dict(metrics, step=self._step)
        heads = [f"{metrics[f'loss_head_{k}']:.2f}" for k in range(len(self._alphas_K))]
        bar.set_postfix_str(
            f"loss {metrics['loss']:.3f} heads {'/'.join(heads)} "
            f"ess {metrics['ess']:.2f} sel {metrics['selected_share']:.2f} "
            f"{metrics['tokens_per_s']:.0f} tok/s {metrics['memory_gib']:.1f} GiB",
            refresh=False,
        )

    def _skip(self, problem: str, rows: list[torch.Tensor]) -> None:
        """Count a step that updates nothing; after too many in a row the run stops.

        ``bad_step/`` then holds the state from before this very step, for ``replay``.
        """
        self._optimizer.zero_grad(set_to_none=True)
        self._bad_steps.skip(self._step + 1, problem, rows)
        if self._bad_steps.is_over_limit:
            with self.watchdog.paused():
                raise TrainingError(self._bad_steps.why_stopped(self.save_checkpoint))

    def validate(self) -> list[float]:
        """Unweighted loss of each head over the whole held-out set, equal on all ranks."""
        batches = heldout_batches(
            self._dataset_val, self._cfg.batch_size, self._rank, self._world, self._device
        )
        batches = self.watchdog.beating(batches, f"validation after step {self._step}", self._step)
        heldout = heldout_losses(self._model, batches)
        metrics = {f"val_loss_head_{k}": loss for k, loss in enumerate(heldout)}
        metrics["val_loss"] = sum(heldout) / len(heldout)
        for logger in self._metric_loggers:
            logger.log_dict(metrics, step=self._step)
        return heldout

    # ----------------------------------------------------------- checkpoints

    def _save_best(self) -> None:
        """Keep ``best/`` when the held-out loss, mean over heads, is the lowest since step 0.

        The loss before training does not count, so there is a ``best/`` also where training made
        the model worse: ``heldout_loss.base`` in summary.json tells.
        """
        loss = sum(self._heldout["last"]) / len(self._heldout["last"])
        if loss < self._best_loss:
            self._best_loss = loss
            self._export("best")

    def _export(self, name: str) -> None:
        """A folder in Meta's format, in the dtype that computed the losses."""
        with self.watchdog.paused():
            save_meta(
                self._model,
                self._output_dir / name,
                tokenizer_path=self._cfg.tokenizer.path,
                dtype=self._dtype,
            )

    def _where(self) -> dict:
        """The position of this rank: what the next micro-step reads and draws."""
        return {
            "micro_step": self._micro_step,
            "epoch": self._epoch,
            "dataloader": self._dataloader.state_dict(),
            "rng": random_state(self._device),
        }

    def save_checkpoint(self, states: TrainingStates) -> None:
        """The training state to resume from, written while training goes on."""
        logger = self._metric_loggers[-1] if self._rank == 0 else None
        position = dict(self._position)
        own = {"rng": position.pop("rng")}
        run = position | {
            "step": self._step,
            "best_loss": self._best_loss,
            "heldout": dict(self._heldout),
            "made_from": self.made_from,
            "statistics": self._statistics,
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "bad_steps": self._bad_steps.state_dict(),
            "config": resolved(self._cfg),
            "run_id": getattr(logger, "run_id", None),
        }
        # Within a row of skipped steps the parameters may be what is wrong.
        in_a_row = self._bad_steps.in_a_row > 0
        with self.watchdog.paused():  # the disk may be slow with the one before
            states.save(self._step, self._model, self._optimizer, run, own, keep_older=in_a_row)

    def _stop(self, reason: str) -> None:
        """Save what the last whole step left, and end all runs of this process."""
        if self._states.last_step != self._step:
            self.save_checkpoint(self._states)
        with self.watchdog.paused():
            self._states.wait()
            if self._rank == 0 and hasattr(self._metric_loggers[-1], "run_id"):
                self._metric_loggers[-1].close("KILLED")
        raise Stopped(reason, self._step)

    def replay(self) -> None:
        """The step at which a run stopped, once more: where what is no number comes from."""
        batches, findings = self._batches(), []
        for _ in range(self._cfg.gradient_accumulation_steps):
            batch = next(batches)
            found = {"rows": row_ids(batch["row"]), "bad_rows": bad_rows(self._model, batch)}
            with first_bad_module(self._model) as modules:
                loss, _, _ = self._loss_step(batch)
            loss.backward()
            found |= {"modules": modules[:1], "gradients": bad_gradients(self._model)}
            findings.append(found)
            self._micro_step += 1
        print_replay(self._step + 1, findings)

    def summary(self) -> dict:
        """Held-out loss per head before and after."""
        name = self._cfg.weighting.name
        summary = {
            "made_from": self.made_from,
            "steps": self._step,
            "heldout_loss": {"base": self._heldout["base"], name: self._heldout["last"]},
        }
        if self._rank == 0 and hasattr(self._metric_loggers[-1], "location"):
            summary["tracking"] = self._metric_loggers[-1].location
        return summary

    def cleanup(self, curves: Path) -> None:
        self._states.close()
        pictures = [curves]
        if self._cfg.get("critic"):
            folder = Path(self._cfg.critic.checkpoint_dir)
            pictures += [
                folder / "critic.json",
                folder / "calibration.png",
                folder / "weights.html",
            ]
        for logger in self._metric_loggers:
            if hasattr(logger, "log_artifact"):
                for picture in filter(Path.exists, pictures):
                    logger.log_artifact(picture)
            logger.close()

    def _on_rank_zero(self, function: Callable) -> Any:
        """Its result on all ranks: what reads every byte of a checkpoint runs once."""
        with self.watchdog.paused():
            return share_from_rank_zero(function() if self._rank == 0 else None)

    def critic_summary(self) -> dict:
        """What the critic showed on held-out data."""
        report = self._check_critic()
        summary = {"critic": {k: v for k, v in report.items() if k != "delta_near_mutation"}}
        if "delta_near_mutation" in report:
            summary["delta_near_mutation"] = report["delta_near_mutation"]
        return summary


def log_zero(message: str) -> None:
    if dist.get_rank() == 0:
        log.info(message)


# ------------------------------------------------------------------ the runs of a config


def run_stages(
    cfg: DictConfig, device: torch.device, mesh: DeviceMesh, stops: StopRequests
) -> dict:
    """Everything that comes before the policy; a stage whose result is there is skipped."""
    recipe = CriticWMTPRecipeDistributed(cfg, device, mesh, stops)
    with one_sentence(ValueError, OSError, TrainingError):
        recipe.setup()
        if "critic" in cfg.stages:
            with recipe.watchdog:
                recipe.train_critic()
        if "values" in cfg.stages:
            recipe.compute_values()
        recipe.free_trunk()
        has_critic = {"critic", "values"} & set(cfg.stages)
        return recipe.critic_summary() if has_critic else {}


def run(
    cfg: DictConfig,
    device: torch.device,
    mesh: DeviceMesh,
    stops: StopRequests,
    beside: dict[str, Path] | None = None,
) -> dict:
    """One policy run, or the summary of one that is complete already.

    Args:
        cfg: its config.
        device: this rank's device.
        mesh: data-parallel mesh.
        stops: what may end it early.
        beside: metrics files of other runs, drawn in the same picture.

    Raises:
        Stopped: when it has saved and has to end.
    """
    output_dir = Path(cfg.output_dir)
    started = time.perf_counter()
    recipe = CriticWMTPRecipeDistributed(cfg, device, mesh, stops)
    with one_sentence(ValueError, OSError):
        recipe.setup()
        if cfg.resume_from_checkpoint and is_done(cfg):
            summary = json.loads((output_dir / "summary.json").read_text())
            if summary.get("made_from") == recipe.made_from:
                return summary
        log_zero(f"{cfg.weighting.name}: {cfg.max_steps} steps, output in {output_dir}")
        recipe.setup_policy()
    with (
        one_sentence(TrainingError, OSError),
        explain_out_of_memory(cfg, recipe.model_args, ranks=dist.get_world_size(), device=device),
        stops.step_by_step(),
        recipe.watchdog,
    ):
        recipe.train()
    summary = recipe.summary() | {"seconds": round(time.perf_counter() - started, 1)}
    with one_sentence(OSError):
        if dist.get_rank() == 0:
            metrics = (beside or {}) | {cfg.weighting.name: output_dir / "metrics.jsonl"}
            plot_curves(metrics, output_dir / "curves.png")
            write_summary(output_dir, summary)
        recipe.cleanup(output_dir / "curves.png")
    return summary


def report(cfg: DictConfig, summary: dict) -> None:
    """Print the figures and where everything is."""
    if "critic" in summary:
        critics.print_report(summary["critic"], summary.get("delta_near_mutation"))
        folder = Path(cfg.critic.checkpoint_dir)
        print(f"  pictures {folder / 'calibration.png'} and {folder / 'weights.html'}")
    if "heldout_loss" in summary:
        print_losses(summary["heldout_loss"], summary["steps"])
        print_places(Path(cfg.output_dir), summary)


@parse
def recipe_main(cfg: DictConfig) -> None:
    with one_sentence(ValueError, OSError):
        check(cfg)
        required = list(required_runs(cfg))
        for one in required:
            check(one)
    with StopRequests(cfg.get("max_hours"), cfg.output_dir) as stops, exit_code(stops):
        with one_sentence(ValueError, OSError):
            device, mesh = init_process_group(cfg.device, cfg.collective_timeout_s)
        if cfg.get("replay"):
            replay(cfg, device, mesh, stops)
        else:
            make_runs(cfg, required, device, mesh, stops)
    patient_barrier()  # a rank that leaves early would abort another's gloo threads
    dist.destroy_process_group()


def make_runs(cfg: DictConfig, required: list[DictConfig], device, mesh, stops) -> None:
    """What comes before the run, its stages, controls, the policy, and their figures."""
    if "policy" in cfg.stages and not cfg.resume_from_checkpoint:
        with one_sentence(ValueError):  # now, not when the controls have had their hours
            for one in (*control_runs(cfg), cfg):
                check_not_begun(Path(one.output_dir))
    if cfg.get("prepare") and dist.get_rank() == 0:
        with one_sentence(ValueError, OSError):
            config.instantiate(cfg.prepare)
    patient_barrier()
    for required_cfg in required:
        run(required_cfg, device, mesh, stops)

    before = [stage for stage in cfg.stages if stage != "policy"]
    summary, seconds = {}, time.perf_counter()
    if before:
        summary |= run_stages(OmegaConf.merge(cfg, {"stages": before}), device, mesh, stops)
    if "policy" in cfg.stages:
        # Controls first, then the run itself: a claim about weighting is a claim against them.
        # What the stages made stays where it is, also where ${output_dir} is a control's.
        made = {name: resolved(cfg).get(name) for name in ("rewards", "critic", "value_table")}
        policy_cfg = OmegaConf.merge(cfg, made, {"stages": ["policy"]})
        heldout, metrics = {}, {}
        runs = [*control_runs(policy_cfg), policy_cfg]
        recipes = (CriticWMTPRecipeDistributed(run_cfg, device, mesh, stops) for run_cfg in runs)
        weighted = next((recipe for recipe in recipes if recipe.needs_critic), None)
        if weighted is not None:
            with one_sentence(ValueError, OSError):
                weighted.setup()
                summary |= weighted.check_policy()
        for run_cfg in runs:
            one = run(run_cfg, device, mesh, stops, metrics)
            heldout |= one["heldout_loss"]
            metrics[run_cfg.weighting.name] = Path(run_cfg.output_dir) / "metrics.jsonl"
        summary = one | summary | {"heldout_loss": heldout}
    summary["seconds"] = round(time.perf_counter() - seconds, 1)
    if dist.get_rank() == 0:
        report(cfg, summary)
        output_dir = Path(cfg.output_dir)
        if "policy" in cfg.stages:
            write_summary(output_dir, summary)
        elif (output_dir / "summary.json").exists():  # a policy's figures stay
            figures = json.loads((output_dir / "summary.json").read_text())
            write_summary(output_dir, figures | summary)


def replay(cfg: DictConfig, device, mesh, stops) -> None:
    """Look at the step at which a run stopped, and leave its files as they are."""
    cfg = OmegaConf.merge(cfg, {"compile": False})  # compiled blocks have no hooks
    recipe = CriticWMTPRecipeDistributed(cfg, device, mesh, stops)
    with one_sentence(ValueError, OSError):
        recipe.setup()
        recipe.setup_policy()
    recipe.replay()


if __name__ == "__main__":
    sys.exit(recipe_main())
