"""Every setting of a run: its name, type, default and meaning. Nothing here reads a file or imports a framework."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class SettingsGroup(BaseModel):
    """Settings are frozen after loading, refuse unknown keys, and never turn one type into another by guessing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataSettings(SettingsGroup):
    """Which records are read, and how their images become features."""

    train: str = Field(description="records to train on: a .jsonl or .parquet file, or `emoji:SPLIT` (the embedded set)")
    val: str | None = Field(None, description="records for the validation loss, in the same forms")
    test: dict[str, str] = Field({}, description="test splits by name; each metric is reported as NAME/METRIC")
    features: Literal["stored", "online"] = Field(
        "stored", description="`stored`: frozen encoders run once and their output is kept; `online`: they run in each step"
    )
    feature_store: str | None = Field(
        None, description="directory of stored features, on storage that all nodes share (default: the user's cache directory)"
    )
    feature_workers: PositiveInt = Field(1, description="encoder processes while features are computed (with GPUs: one GPU each)")
    loader_workers: Annotated[int, Field(ge=0)] = Field(0, description="data loader processes per training worker")


class TrainingSettings(SettingsGroup):
    """How long, in which batches and how fast the weights move."""

    max_epochs: PositiveInt | None = Field(None, description="stop after this many passes over the training records")
    max_steps: PositiveInt | None = Field(None, description="stop after this many optimizer steps, if that comes first")
    batch_size: PositiveInt = Field(16, description="records per worker and forward pass")
    accumulate: PositiveInt = Field(1, description="forward passes per optimizer step")
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate of AdamW")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="steps of linear warm-up, before a cosine decay to zero")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay, on matrices only")
    gradient_clip: PositiveFloat | None = Field(1.0, description="largest global norm of the gradient; null for none")
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="compute precision; `auto` takes bf16 where the hardware multiplies it natively"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    log_every: PositiveInt = Field(10, description="steps between two writes of metrics (every step is kept)")

    @model_validator(mode="after")
    def _has_an_end(self) -> "TrainingSettings":
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("set training.max_epochs or training.max_steps, or both: without one, training has no end")
        return self


class CheckpointSettings(SettingsGroup):
    """When checkpoints are saved, and which one counts as the best. The latest is always kept beside it."""

    every_steps: PositiveInt | None = Field(
        50, description="save every so many steps as well as at each epoch's end; null for epochs' ends alone"
    )
    best_of: Literal["epochs", "saves"] = Field(
        "epochs", description="checkpoints that compete for the best: those at epochs' ends (and the run's), or every one saved"
    )

    monitor: Literal["train_loss", "val/loss"] = Field("train_loss", description="metric that ranks checkpoints")
    mode: Literal["min", "max"] = Field("min", description="whether a smaller or a larger monitored metric is better")


class LaunchSettings(SettingsGroup):
    """What Ray is asked for."""

    num_workers: PositiveInt = Field(1, description="training workers")
    use_gpu: bool = Field(False, description="one GPU per worker; otherwise CPUs only")
    cpus_per_worker: PositiveInt | None = Field(
        None, description="CPUs reserved per worker, and its threads (default: 1 with a GPU, else the cluster shared out)"
    )
    strategy: Literal["ddp", "fsdp"] = Field("ddp", description="replicate what trains (ddp) or shard it over the workers (fsdp)")
    max_failures: Annotated[int, Field(ge=0)] = Field(0, description="worker group restarts before the run counts as failed")
    object_store_mb: Annotated[int, Field(ge=80)] = Field(300, description="object store of a Ray that is started here, in MB")


class OutputSettings(SettingsGroup):
    """Where run directories go."""

    root: str = Field("checkpoints", description="run directories are made under ROOT/alignment, ROOT/phase2 and ROOT/sweeps")


class TrackingSettings(SettingsGroup):
    """Where MLflow keeps the run."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI")
    experiment: str | None = Field(None, description="MLflow experiment (default: one per phase)")
    system_metrics: bool = Field(False, description="also record CPU, memory and GPU use of each node")


class EvaluationSettings(SettingsGroup):
    """What is measured on the test splits after training."""

    batch_size: PositiveInt = Field(64, description="records per forward pass")
    max_records: PositiveInt | None = Field(None, description="records per test split and task, drawn by seed; null for all")
    max_new_tokens: PositiveInt = Field(16, description="longest generated answer, in tokens (phase 2)")
    shuffled: bool = Field(True, description="measure again with the images shuffled: does the model look at all? (phase 2)")
    samples: Annotated[int, Field(ge=0)] = Field(20, description="sample answers kept per test split (phase 2)")


class AlignmentModelSettings(SettingsGroup):
    """Phase 1: frozen encoders and the aligner that maps them into one space."""

    image_encoder: str = Field("efficientnet-lite0", description="hub ID, local directory or packaged name of a vision encoder")
    image_size: PositiveInt | None = Field(None, description="side in pixels that images are resized to (default: the encoder's own)")
    text_encoder: str = Field("all-minilm-l6-v2", description="hub ID, local directory or packaged name of a text encoder")
    dimension: PositiveInt = Field(256, description="width of the shared space")
    hidden: PositiveInt = Field(512, description="width of the hidden layer of each branch")
    dropout: Fraction = Field(0.2, description="dropout in the branches")
    loss: Literal["softmax", "sigmoid"] = Field("softmax", description="contrastive loss: CLIP's softmax or SigLIP's sigmoid form")


class LoraSettings(SettingsGroup):
    """Low-rank adapters (arXiv:2106.09685), through peft."""

    rank: PositiveInt = Field(16, description="rank of the adapters")
    alpha: PositiveInt = Field(32, description="scale of the adapters: alpha / rank")
    dropout: Fraction = Field(0.0, description="dropout on the adapters' input (on CPUs it halves the speed: masks are drawn for each)")
    target_modules: str | list[str] = Field("all-linear", description="modules that get an adapter, as peft takes them")


class InstructionModelSettings(SettingsGroup):
    """Phase 2: a causal language model that sees images through the aligner of phase 1."""

    language_model: str = Field("smollm2-135m-instruct", description="hub ID, local directory or packaged name of a causal LM")
    image_encoder: str = Field("efficientnet-lite0", description="must be the vision encoder that the aligner was trained on")
    image_size: PositiveInt | None = Field(None, description="side in pixels; must be the one that the aligner was trained on")
    aligner: str = Field("latest", description="path of an aligner.pt, a phase 1 run ID (or its start), or `latest`")
    train_aligner: bool = Field(False, description="train the aligner on, instead of keeping it as phase 1 left it")
    soft_tokens: PositiveInt = Field(16, description="soft tokens per image; a larger grid is averaged down to this number")
    soft_token_dropout: Fraction = Field(0.0, description="share of soft tokens that are blank in each training step")
    tuning: Literal["lora", "full", "frozen"] = Field("lora", description="what trains in the language model")
    lora: LoraSettings = LoraSettings()
    system_prompt: str | None = Field(None, description="system message; null leaves it to the tokenizer's chat template")
    max_length: PositiveInt | None = Field(None, description="longest record in tokens (default: the context of the language model)")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention kernel; `auto`: eager on CPUs (measured: 1.6x the speed of sdpa there), sdpa on GPUs"
    )


class RunSettings(SettingsGroup):
    """What the settings of both phases share."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seeds initial weights, data order and dropout")
    data: DataSettings
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    launch: LaunchSettings = LaunchSettings()
    output: OutputSettings = OutputSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _monitor_exists(self) -> "RunSettings":
        if problem := monitor_problem(self.checkpoint.monitor, self.data.val):
            raise ValueError(problem)
        return self


def monitor_problem(monitor: object, val: object) -> str | None:
    """What is wrong with monitoring this metric, given these validation records."""
    if monitor != "train_loss" and val is None:
        return f"checkpoint.monitor={monitor} is measured on validation records, but data.val is not set"
    return None


class AlignmentSettings(RunSettings):
    """Settings of a phase 1 run."""

    model: AlignmentModelSettings = AlignmentModelSettings()


class InstructionSettings(RunSettings):
    """Settings of a phase 2 run."""

    model: InstructionModelSettings = InstructionModelSettings()


Settings = AlignmentSettings | InstructionSettings
SETTINGS_OF_PHASE: dict[int, type[AlignmentSettings] | type[InstructionSettings]] = {1: AlignmentSettings, 2: InstructionSettings}


def flatten(settings: SettingsGroup) -> dict[str, Any]:
    """Every setting by its dotted path, in the order of definition: `{"training.batch_size": 16, ...}`."""
    return flatten_tree(settings.model_dump(mode="json"))


def flatten_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted paths: settings that were written down, for one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten_tree(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat
