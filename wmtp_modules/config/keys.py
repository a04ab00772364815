"""Keys that both training recipes have. What a component takes is read from its signature."""

from torchtune import training

from wmtp_modules.config.check import Above, AtLeast, Component, Nullable, Optional

OPTIMIZER = Component(given=("params",), keys={"lr": Optional(Above(float, 0))}, makes="Optimizer")

# Where MLflow is, whether a run may begin without it, and what the run is called there.
TRACKING = Optional(
    {
        "uri": Optional(str),
        "required": Optional(bool),
        "artifact_root": Optional(str),
        "experiment": Optional(str),
        "run_name": Optional(str),
    }
)
# Name under which best/ is registered at the end of a training run; null: it is not.
REGISTRY = Optional({"model_name": Optional(str)})
# Where a run's files go, and folders on this machine: for what lies in a store, and for the moment.
STORAGE = Optional(
    {
        "root": Optional(str),
        "cache": Optional(str),
        "endpoint": Optional(str),
        "scratch": Optional(str),
    }
)

TRAINING_KEYS = {
    "output_dir": str,
    "storage": STORAGE,
    "device": ("cuda", "cpu"),
    "dtype": ("bf16", "fp32"),
    "fp32_master_weights": bool,
    "seed": AtLeast(int, 0),
    "resume_from_checkpoint": bool,
    "model": Component(makes="MTPTransformer"),
    "checkpointer": Nullable({"checkpoint_dir": str}),  # null: start from nothing
    "tokenizer": Component(
        keys={"path": str, "max_seq_len": AtLeast(int, 2)}, makes="Llama2Tokenizer"
    ),
    "dataset": Component(given=("tokenizer",), makes="Dataset"),
    "dataset_val": Component(given=("tokenizer",), makes="Dataset"),
    "batch_size": AtLeast(int, 1),  # packed rows of a rank's micro-batch
    "gradient_accumulation_steps": AtLeast(int, 1),
    "optimizer": OPTIMIZER,
    "num_warmup_steps": AtLeast(int, 0),
    "clip_grad_norm": Above(float, 0),
    "max_steps": AtLeast(int, 1),
    "run_val_every_n_steps": AtLeast(int, 1),
    "save_every_n_steps": AtLeast(int, 1),
    "keep_last": AtLeast(int, 1),  # training states
    "max_skipped_steps": AtLeast(int, 1),  # in a row, without an update
    "collective_timeout_s": Above(float, 0),  # a rank without progress for longer hangs
    "max_hours": Optional(Above(float, 0)),  # the run saves and ends before
    "replay": Optional(str),  # bad_step/ of a run: repeat its last step, train nothing
    "log_every_n_steps": AtLeast(int, 1),
    "enable_activation_checkpointing": bool,
    "compile": bool,
    "metric_logger": Optional(Component(makes="MetricLoggerInterface")),
    "tracking": TRACKING,
    "registry": REGISTRY,
    "profiler": training.setup_torch_profiler,
    # What comes before the run, and beside it for comparison.
    "assets_dir": Optional(str),
    "prepare": Optional(Component()),
    "requires": Optional(list[str]),
    "controls": Optional(list | dict),  # see run/controls.py
    "control": Optional({"name": str, "overrides": dict}),  # in the config of a control
}
