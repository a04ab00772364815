"""Keys that both training recipes have, and the blocks of each recipe's own.

What a component takes is read from its signature. A field without a default has to be given; one
that is ``None`` may be left out or null. ``docs/configuration.md`` is made of what stands here.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torchtune import training

from wmtp_modules.config.check import Arguments, Component, Keys


class Learning(Keys):
    lr: float = Field(1e-3, gt=0, description="learning rate")


class Pieces(Keys):
    path: str = Field(description="file of the tokenizer")
    max_seq_len: int = Field(ge=2, description="tokens of a packed row")


Model = Annotated[dict, Component(makes="MTPTransformer")]
Tokenizer = Annotated[dict, Component(keys=Pieces, makes="Llama2Tokenizer")]
Dataset = Annotated[dict, Component(given=("tokenizer",), makes="Dataset")]
Optimizer = Annotated[dict, Component(given=("params",), keys=Learning, makes="Optimizer")]
MetricLogger = Annotated[dict, Component(makes="MetricLoggerInterface")]
Prepare = Annotated[dict, Component()]
Profiler = Annotated[dict, Arguments(training.setup_torch_profiler)]


class Folder(Keys):
    checkpoint_dir: str = Field(description="folder of the checkpoint")


class Tracking(Keys):
    uri: str | None = Field(None, description="where MLflow is")
    required: bool | None = Field(None, description="whether no run begins without it")
    artifact_root: str | None = Field(None, description="where its artifacts go, if not to uri")
    experiment: str | None = Field(None, description="its experiment")
    run_name: str | None = Field(None, description="what the run is called there")


class Registry(Keys):
    model_name: str | None = Field(None, description="what best/ is registered as; null: not")


class Storage(Keys):
    root: str | None = Field(None, description="folder or store for what runs write")
    cache: str | None = Field(None, description="folder here for what lies in a store")
    endpoint: str | None = Field(None, description="server of the store, if not Amazon's")
    scratch: str | None = Field(None, description="folder here for the moment")


class Control(Keys):
    name: str = Field(description="name of the control")
    overrides: dict[str, Any] = Field(description="what differs from the run")


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]


class Lora(Keys):
    rank: int = Field(16, ge=1, description="rows of A, columns of B")
    alpha: float = Field(32.0, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of an adapter's input")
    targets: Literal["all-linear"] | list[LoraTarget] = Field(
        "all-linear", description="layers of a block; w1, w2, w3 are the MLP's gate, down and up"
    )
    heads: bool = Field(True, description="heads 1 to K - 1 too; trunk and head 0 always")
    quantize_base: bool = Field(False, description="QLoRA: adapted layers frozen in NF4")
    save_adapter_only: bool = Field(False, description="best/ and last/ without the merged model")


class Distilled(Keys):
    weight: float = Field(0.5, gt=0, le=1, description="share in their loss; 1: nothing else")
    temperature: float = Field(1.0, gt=0, description="of both distributions")


class Places(Keys):
    """Keys of every recipe."""

    output_dir: str = Field(description="folder or URL that the run writes to")
    storage: Storage | None = Field(None, description="where files go, docs/storage.md")
    device: Literal["cuda", "cpu"] = Field(description="what it runs on")
    dtype: Literal["bf16", "fp32"] = Field(description="what is computed in")
    seed: int = Field(ge=0, description="of everything random")
    metric_logger: MetricLogger | None = Field(None, description="a logger of figures")
    tracking: Tracking | None = Field(None, description="MLflow, docs/environments.md")
    registry: Registry | None = Field(None, description="MLflow's registry, docs/registry.md")
    assets_dir: str | None = Field(None, description="folder of what prepare makes")
    prepare: Prepare | None = Field(None, description="called first: makes data and model")


class TrainingKeys(Places):
    """Keys of every recipe that trains."""

    fp32_master_weights: bool = Field(description="whether parameters are fp32 beside bf16 compute")
    resume_from_checkpoint: bool = Field(description="whether to go on from output_dir's states")
    model: Model = Field(description="the model to build")
    checkpointer: Folder | None = Field(description="what training starts from; null: nothing")
    lora: Lora | None = Field(
        None, description="adapters on a frozen model; null: all of it trains"
    )
    extra_heads: Literal["full", "isolated", "only"] | None = Field(
        None,
        description="whether heads 1 to K - 1 train with all else, beside it, or alone; null: full",
    )
    distill: Distilled | None = Field(
        None, description="heads 1 to K - 1 learn from head 0 too, docs/heads.md; null: not"
    )
    tokenizer: Tokenizer = Field(description="the tokenizer")
    dataset: Dataset = Field(description="rows to train on, docs/data.md")
    dataset_val: Dataset = Field(description="held-out rows")
    batch_size: int = Field(ge=1, description="packed rows of a rank's micro-batch")
    dataloader_workers: int | None = Field(
        None, ge=0, description="processes of a rank that read ahead; null: none"
    )
    gradient_accumulation_steps: int = Field(ge=1, description="micro-batches of an update")
    data_parallel_shard: int | None = Field(
        None, ge=-1, description="ranks that share one model, docs/nodes.md; null or -1: all"
    )
    sync_each_batch: bool | None = Field(
        None, description="gradients cross nodes each micro-batch; null: unless nodes are replicas"
    )
    reshard_after_forward: bool | None = Field(
        None, description="trunk blocks are gathered again for the backward; null: yes"
    )
    optimizer: Optimizer = Field(description="the optimizer")
    num_warmup_steps: int = Field(ge=0, description="updates until the full learning rate")
    clip_grad_norm: float = Field(gt=0, description="largest norm of the gradient")
    max_steps: int = Field(ge=1, description="updates in all")
    run_val_every_n_steps: int = Field(ge=1, description="updates between held-out losses")
    save_every_n_steps: int = Field(ge=1, description="updates between training states")
    keep_last: int = Field(ge=1, description="training states that are kept")
    max_skipped_steps: int = Field(ge=1, description="steps in a row without an update")
    collective_timeout_s: float = Field(
        gt=0, description="seconds after which a rank without progress hangs"
    )
    max_hours: float | None = Field(
        None, gt=0, description="hours before which the run saves and ends"
    )
    replay: str | None = Field(None, description="bad_step/ of a run: repeat that step, no more")
    log_every_n_steps: int = Field(ge=1, description="updates between logged figures")
    activation_checkpointing: Literal["none", "selective", "full", "auto"] | None = Field(
        None, description="what blocks compute twice to save memory; auto: the least that fits"
    )
    enable_activation_checkpointing: bool | None = Field(
        None, description="older name: true is full, false is none"
    )
    float8: Literal["tensorwise", "rowwise"] | None = Field(
        None, description="products of blocks in float8, by this recipe of torchao's; null: not"
    )
    compile: bool = Field(description="whether torch.compile is used")
    profiler: Profiler = Field(description="torchtune's profiler")
    requires: list[str] | None = Field(None, description="configs of runs that come before")
    controls: list | dict | None = Field(None, description="runs beside it, by their overrides")
    control: Control | None = Field(None, description="in the config of a control only")


# ----------------------------------------------------------------- of the Rho-1 recipe


class Reference(Keys):
    mode: Literal["cached", "online"] = Field(description="losses from a table, or each step")
    checkpointer: Folder = Field(description="the reference model")
    table_dir: str = Field(description="folder of the table of its losses")
    batch_tokens: int = Field(ge=1, description="tokens of a batch that it scores")


# ---------------------------------------------------------------- of the critic's recipe


class Rewards(Keys):
    source: Literal["reward_model", "column", "labels"] = Field(description="where they are from")
    checkpointer: Folder | None = Field(None, description="the reward model")
    table_dir: str = Field(description="folder of their table")
    batch_tokens: int = Field(ge=1, description="tokens of a batch that is scored")
    good: Literal["label", "above", "sigmoid"] | None = Field(
        None, description="what f(R) is; null: label for labels, else above"
    )
    threshold: float | None = Field(None, description="of the standardised reward; null: 0")
    temperature: float | None = Field(None, gt=0, description="of sigmoid; null: 1")


class Critic(Keys):
    objective: Literal["bce", "pairs"] | None = Field(None, description="null: bce")
    head: Literal["state", "turn"] | None = Field(
        None, description="null: turn; objective pairs has its own"
    )
    dataset: Dataset | None = Field(None, description="what it learns from; null: the policy's")
    checkpoint_dir: str = Field(description="folder that it is written to")
    optimizer: Optimizer = Field(description="its optimizer")
    batch_size: int = Field(ge=1, description="rows, or pairs of rows, of a rank")
    max_steps: int = Field(ge=1, description="updates in all")
    eval_every_n_steps: int = Field(ge=1, description="updates between held-out losses")
    patience: int = Field(ge=1, description="evaluations without a better held-out loss")


class ValueTable(Keys):
    table_dir: str = Field(description="folder of the table")
    batch_tokens: int = Field(ge=1, description="tokens of a batch that is scored")


# -------------------------------------------------------------------- of the evaluation


class EvalPieces(Keys):
    path: str = Field(description="file of the tokenizer")
    max_seq_len: int | None = Field(None, ge=2, description="null: the model's")


EvalTokenizer = Annotated[dict, Component(keys=EvalPieces, makes="Llama2Tokenizer")]


class Generation(Keys):
    samples_per_task: int = Field(ge=1, description="samples of each task and temperature")
    temperatures: list[float] = Field(description="distinct, at least 0; 0: greedy")
    top_p: float = Field(gt=0, le=1, description="share of probability kept; 1: all")
    top_k: int = Field(ge=0, description="tokens kept; 0: all")
    max_new_tokens: int = Field(ge=1, description="tokens of a sample at most")
    batch_size: int = Field(ge=1, description="samples at a time on each rank")
    decoding: Literal["plain", "self_speculative"] = Field(description="how tokens are drawn")


class Execution(Keys):
    tier: Literal["auto", "bubblewrap", "landlock", "rlimits"] = Field(
        description="the sandbox's walls, docs/sandbox.md"
    )
    workers: int | None = Field(None, ge=1, description="programs at a time; null: by cores")


class Heldout(Keys):
    source: str | list[str] = Field(description="rows, as rows_dataset takes them: docs/data.md")
    columns: dict[str, str] | None = Field(None, description="the source's names of fields")
    batch_tokens: int = Field(ge=1, description="tokens of a batch")


class DecodeSpeed(Keys):
    source: str | list[str] = Field(description="rows, as rows_dataset takes them: docs/data.md")
    prompts: int = Field(ge=1, description="texts that are continued")
    prompt_tokens: int = Field(ge=1, description="tokens of each prompt")
    max_new_tokens: int = Field(ge=1, description="tokens of each continuation")
    batch_size: int = Field(ge=1, description="prompts at a time")
