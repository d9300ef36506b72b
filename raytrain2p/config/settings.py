"""Every setting of a run: its name, type, default, meaning and metadata. Nothing here reads a file or imports a framework."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from raytrain2p.config.metadata import FIXED, FREE, LIVE, SHARED, VARIES, Metadata, setting
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.config.problems import InputError, Problem

MOST = 2**31 - 1  # of what is counted: arrays of numbers, Ray and MLflow hold no more
WIDEST = 32_768  # of a layer: wider ones would need the memory of the largest language models
MOST_DIVIDED = 65_536  # workers among whom a batch is tried to be divided, to name the numbers that can
LONGEST_NAME, LONGEST_PATH = 255, 4000
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
ImageSide = Annotated[int, Field(gt=0, le=8192)]
Width = Annotated[int, Field(gt=0, le=WIDEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_SOFT_TOKENS = 16
INIT, ALIGNER = "model.init", "model.aligner"  # these name the artifact of another run: what a run came from
NAMES_A_MODEL = "a hub ID, a packaged name, or a local directory, whose path is resolved when settings are loaded"
MODEL = "hub ID (OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit), local directory or packaged name"


def _named(text: str) -> str:
    if len(text) > LONGEST_PATH or any(len(part.encode(errors="replace")) > LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"has more than {LONGEST_PATH} characters, or more than {LONGEST_NAME} bytes in one name: no file system takes it")
    return text


def _workers(value: int | list[int]) -> int | list[int]:
    ends = value if isinstance(value, list) else [value]
    if len(ends) != (2 if isinstance(value, list) else 1) or not 0 < ends[0] <= ends[-1] <= MOST:
        raise ValueError("required: a number greater than 0, or a range of two such as [1, 4]")
    return value


Workers = Annotated[int | list[int], AfterValidator(_workers)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_named)]  # of a path or a name
ModelName = Annotated[Text, NAMES_A_MODEL]

# Metadata that most settings of a group share; the exceptions stand beside the field.
_DATA = Metadata(resume=FREE, splits=True, trial=VARIES, sweep_resume=FIXED)
_TRAINING = Metadata(resume=FREE, splits=False, trial=VARIES, sweep_resume=FIXED)
_OF_ALL_TRIALS = Metadata(resume=FREE, splits=False, trial=SHARED, sweep_resume=FIXED)  # how trials are compared and what they may use
_MODEL = Metadata(resume=FIXED, splits=False, trial=VARIES, sweep_resume=FIXED)
_ENCODER = _MODEL.but(splits=True)
_INIT = _MODEL.but(splits=True, trial=SHARED)
_NAMED_INIT = "a run ID (or its start), launch ID, run directory or path, or `latest`; optimizer, schedule and steps begin anew"


class SettingsGroup(BaseModel):
    """Settings are frozen after loading, refuse unknown keys, are never converted from one type to another, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(SettingsGroup):
    """One source of records: a file, a pattern or an embedded set, and its share of each epoch relative to the others'."""

    path: Text
    weight: PositiveFloat | None = None


def _source(value: Any) -> Any:
    """`FILE` is short for `{path: FILE}`."""
    return {"path": value} if isinstance(value, str) else value


def _short(sources: list[Source]) -> Any:
    """As a user would write it; never a mapping, which `flatten` would take for a group of settings."""
    written = [source.path if source.weight is None else source.model_dump() for source in sources]
    return written[0] if len(written) == 1 and isinstance(written[0], str) else written


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(_source)]],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    Field(min_length=1),
    PlainSerializer(_short),
]


class DataSettings(SettingsGroup):
    """Which records are read, and how their media become features."""

    train: Sources = setting(
        ...,
        "records to train on: a .jsonl, .json or .parquet file, a pattern, an embedded set (`emoji:train`), or a list of "
        "these or of `{path, weight}`",
        _DATA.but(resume=FIXED),
    )
    val: Sources | None = setting(None, "records for the validation loss, in the same forms", _DATA.but(trial=SHARED))
    test: dict[str, Sources] = setting({}, "test splits by name; each metric is reported as NAME/METRIC", _DATA.but(trial=SHARED))
    loss_on: Literal["all", "last"] = setting(
        "all", "assistant messages that are learnt: all, or the last of each record (phase 2)", _DATA.but(resume=FIXED)
    )
    too_long: Literal["error", "truncate", "drop"] = setting(
        "error", "records longer than model.max_length: refuse, cut off their end, or leave them out (phase 2)", _DATA.but(resume=FIXED)
    )
    features: Literal["stored", "online"] = setting(
        "stored", "`stored`: frozen encoders run once and their output is kept; `online`: they run in each step", _DATA
    )
    feature_store: Text | None = setting(
        None, "directory of stored features, on storage that all nodes share (default: the user's cache directory)", _DATA.but(trial=SHARED)
    )
    feature_workers: Annotated[int, Field(gt=0, le=1024)] = setting(
        1, "encoder processes while features are computed (with GPUs: launch.gpus_per_worker each)", _DATA.but(sweep_resume=FREE)
    )
    loader_workers: Annotated[int, Field(ge=0, le=128)] | None = setting(
        None, "data loader processes per training worker (default: 2 with GPUs, else 0)", _DATA
    )

    @model_validator(mode="after")
    def _weights_are_of_training(self) -> "DataSettings":
        others = {"data.val": self.val or []} | {f"data.test.{name}": sources for name, sources in self.test.items()}
        for name, sources in others.items():
            if any(source.weight is not None for source in sources):
                raise ValueError(f"{name} has a weight: every record is evaluated once, leave the weight out")
        return self


class TrainingSettings(SettingsGroup):
    """How long, in which batches and how fast the weights move."""

    max_epochs: PositiveInt | None = setting(None, "stop after this many passes over the training records", _TRAINING)
    max_steps: PositiveInt | None = setting(None, "stop after this many optimizer steps, if that comes first", _TRAINING)
    global_batch_size: PositiveInt = setting(16, "records per optimizer step, over all workers", _TRAINING.but(resume=FIXED))
    micro_batch_size: PositiveInt | None = setting(
        None, "records per worker and forward pass (default: training.global_batch_size / launch.num_workers, one pass a step)", _TRAINING
    )
    learning_rate: PositiveFloat = setting(1e-3, "peak learning rate of AdamW", _TRAINING.but(resume=FIXED, trial=LIVE))
    warmup_steps: Count = setting(20, "steps of linear warm-up, before a cosine decay to zero", _TRAINING.but(resume=FIXED))
    weight_decay: Annotated[float, Field(ge=0)] = setting(
        0.0, "decoupled weight decay, on matrices only", _TRAINING.but(resume=FIXED, trial=LIVE)
    )
    gradient_clip: PositiveFloat | None = setting(1.0, "largest global norm of the gradient; null for none", _TRAINING.but(trial=LIVE))
    max_nonfinite_steps: Count = setting(
        3,
        "steps in a row whose loss or gradient is not finite: they are reported and not applied; after one more, training fails. "
        "Checked every training.log_every steps",
        _TRAINING,
    )
    precision: Literal["auto", "bf16", "float32"] = setting(
        "auto", "compute precision; `auto` takes bf16 where the hardware multiplies it natively", _TRAINING
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time", _TRAINING)
    log_every: PositiveInt = setting(10, "steps between two writes of metrics (every step is kept)", _TRAINING)

    @model_validator(mode="after")
    def _has_an_end(self) -> "TrainingSettings":
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("set training.max_epochs or training.max_steps, or both: without one, training has no end")
        return self

    def micro_batch(self, workers: int) -> int:
        """Records per worker and forward pass."""
        return self.micro_batch_size or self.global_batch_size // workers

    def gradient_accumulation_steps(self, workers: int) -> int:
        """Forward passes per optimizer step."""
        return self.global_batch_size // (self.micro_batch(workers) * workers)


class CheckpointSettings(SettingsGroup):
    """When checkpoints are saved, and which one counts as the best. The latest is always kept beside it."""

    every_steps: PositiveInt | None = setting(
        50, "save every so many steps as well as at each epoch's end; null for epochs' ends alone", _OF_ALL_TRIALS
    )
    best_of: Literal["epochs", "saves"] = setting(
        "epochs", "checkpoints that compete for the best: those at epochs' ends (and the run's), or every one saved", _OF_ALL_TRIALS
    )

    monitor: Literal["train_loss", "val/loss"] = setting("train_loss", "metric that ranks checkpoints", _OF_ALL_TRIALS.but(resume=FIXED))
    mode: Literal["min", "max"] = setting(
        "min", "whether a smaller or a larger monitored metric is better", _OF_ALL_TRIALS.but(resume=FIXED)
    )


class LaunchSettings(SettingsGroup):
    """What Ray is asked for."""

    num_workers: Workers = setting(
        1, "training workers; `[1, 4]`: as many of 1 to 4 as the cluster has room for, while nodes come and go", _OF_ALL_TRIALS
    )
    use_gpu: bool | Literal["auto"] = setting(
        "auto", "train and encode on GPUs; `auto`: if the cluster has any, or its autoscaler can add some", _OF_ALL_TRIALS
    )
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "with GPUs: the share of one that is reserved per worker and per encoder process; less than 1 for a single worker",
        _OF_ALL_TRIALS,
    )
    accelerator_type: Text | None = setting(None, "GPUs of this type alone, as Ray names it: H100, L4", _OF_ALL_TRIALS)
    cpus_per_worker: PositiveInt | None = setting(
        None,
        "CPUs reserved per worker, and its threads (default: with GPUs, a node's CPUs shared out among them; else the cluster shared out)",
        _OF_ALL_TRIALS.but(sweep_resume=FREE),
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK",
        "on few nodes (PACK) or many (SPREAD) if possible, on a single one (STRICT_PACK), or each worker on another (STRICT_SPREAD)",
        _OF_ALL_TRIALS.but(sweep_resume=FREE),
    )
    wait_for_nodes_s: Count | None = setting(
        None,
        "seconds to wait for nodes that the cluster lacks; its autoscaler, if it has one, is asked for them (default: 1800 with an "
        "autoscaler, else 0)",
        _OF_ALL_TRIALS.but(sweep_resume=FREE),
    )
    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp", "replicate what trains (ddp) or shard it over the workers (fsdp)", _OF_ALL_TRIALS.but(resume=FIXED)
    )
    shard_workers: PositiveInt | None = setting(
        None,
        "with fsdp, workers among whom weights are sharded, such as those of one node; each such group has a copy (HSDP) (default: all)",
        _OF_ALL_TRIALS,
    )
    max_failures: Count | None = setting(
        None,
        "worker group restarts before the run counts as failed (default: 3 on an existing cluster, 0 on a Ray that is started here)",
        _OF_ALL_TRIALS,
    )
    max_preemptions: Count | None = setting(
        None,
        "restarts because nodes were taken away, not counted in launch.max_failures; null for any number. Where launch.num_workers is a "
        "range, nodes lost without notice are among them",
        _OF_ALL_TRIALS,
    )
    grow_after_s: PositiveInt = setting(
        60, "with a range of workers, seconds of training before the group is restarted with more of them", _OF_ALL_TRIALS
    )
    hang_timeout_s: PositiveInt = setting(
        120,
        "seconds after which a worker whose process does not answer (stopped, or its node is gone) counts as failed; Ray "
        "then ends it within 40 seconds. Long steps, validation and evaluation do not count, since another thread answers",
        _OF_ALL_TRIALS,
    )
    object_store_mb: Annotated[int, Field(ge=80, le=MOST)] = setting(
        300, "object store of a Ray that is started here, in MB", _OF_ALL_TRIALS.but(sweep_resume=FREE)
    )

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def sharing(self) -> int:
        """Workers among whom weights are sharded; 1: each has a copy. Of a fixed number of workers."""
        return min(self.shard_workers or self.min_workers, self.min_workers) if self.strategy == "fsdp" else 1

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run trains."""
        return self.min_workers < self.max_workers

    @property
    def gpus(self) -> float:
        """GPUs of a worker, once `auto` is resolved."""
        return self.gpus_per_worker if self.use_gpu is True else 0.0


class OutputSettings(SettingsGroup):
    """Where run directories go."""

    root: Text = setting(
        "checkpoints",
        "run directories are made under ROOT/alignment, ROOT/phase2 and ROOT/sweeps; or s3://BUCKET/PREFIX, gs:// or az://",
        _OF_ALL_TRIALS.but(resume=FIXED),
    )


class TrackingSettings(SettingsGroup):
    """Where MLflow keeps the run."""

    uri: Text = setting("sqlite:///mlflow.db", "MLflow tracking URI", _OF_ALL_TRIALS.but(resume=FIXED))
    experiment: Text | None = setting(None, "MLflow experiment (default: one per phase)", _OF_ALL_TRIALS.but(resume=FIXED))
    system_metrics: bool | None = setting(None, "also record CPU, memory and GPU use of each node (default: with GPUs)", _OF_ALL_TRIALS)


class EvaluationSettings(SettingsGroup):
    """What is measured on the test splits after training."""

    batch_size: PositiveInt = setting(
        64, "records per forward pass; in validation fewer of those that are longer than the mean", _OF_ALL_TRIALS
    )
    max_records: PositiveInt | None = setting(
        None, "records per test split and task, drawn by seed; null for all (phase 2)", _OF_ALL_TRIALS.but(splits=True)
    )
    max_new_tokens: PositiveInt = setting(16, "longest generated answer, of samples and for token F1, in tokens (phase 2)", _OF_ALL_TRIALS)
    shuffled: bool = setting(True, "measure again with the media shuffled: does the model use them at all? (phase 2)", _OF_ALL_TRIALS)
    samples: Count = setting(20, "sample answers kept per test split (phase 2)", _OF_ALL_TRIALS)


class EncoderSettings(SettingsGroup):
    """A frozen encoder. `model.encoders.image=NAME` is short for `model.encoders.image.name=NAME`."""

    name: ModelName = setting(..., MODEL, _ENCODER)
    precision: Literal["bf16"] | None = setting(
        None, "bf16: of its weights and its layers; half the memory, and faster where hardware has it (default: float32)", _ENCODER
    )

    def options(self) -> dict[str, Any]:
        """What is set beside the name."""
        return {key: value for key, value in self if key != "name" and value is not None}


class ImageEncoderSettings(EncoderSettings):
    """Of images."""

    name: ModelName = setting("efficientnet-lite0", f"{MODEL} of a vision encoder", _ENCODER)
    size: ImageSide | None = setting(None, "side in pixels that images are resized to (default: the encoder's own)", _ENCODER)


class AudioEncoderSettings(EncoderSettings):
    """Of sound."""

    name: ModelName = setting("whisper-tiny.en", f"{MODEL} of a speech encoder", _ENCODER)
    pool: PositiveInt | None = setting(None, "neighbouring positions averaged into one (default: none are)", _ENCODER)


class TextEncoderSettings(EncoderSettings):
    """Of text."""

    name: ModelName = setting("all-minilm-l6-v2", f"{MODEL} of a text encoder", _ENCODER)
    layer: Count | None = setting(None, "layer to take, 0 is the embeddings (default: the last)", _ENCODER)
    pooled: bool | None = setting(None, "false: a vector for each token, not their mean alone (default: true)", _ENCODER)


def _encoder(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


_Named = BeforeValidator(_encoder)


class EncodersSettings(SettingsGroup):
    """The encoder of each modality; null for a modality that is not used."""

    image: Annotated[ImageEncoderSettings | None, _Named] = None
    audio: Annotated[AudioEncoderSettings | None, _Named] = None
    text: Annotated[TextEncoderSettings | None, _Named] = None

    def by_modality(self) -> dict[str, EncoderSettings]:
        """Those that are used."""
        return {modality: encoder for modality, encoder in self if encoder is not None}


class AlignedEncodersSettings(EncodersSettings):
    """Of phase 1: images and text, unless set otherwise."""

    image: Annotated[ImageEncoderSettings | None, _Named] = ImageEncoderSettings()
    text: Annotated[TextEncoderSettings | None, _Named] = TextEncoderSettings()


class AlignmentModelSettings(SettingsGroup):
    """Phase 1: frozen encoders and the aligner that maps them into one space."""

    encoders: AlignedEncodersSettings = AlignedEncodersSettings()
    dimension: Width = setting(256, "width of the shared space", _MODEL)
    hidden: Width = setting(512, "width of the hidden layer of each branch", _MODEL)
    dropout: Fraction = setting(0.2, "dropout in the branches", _MODEL.but(trial=LIVE))
    input_norm: bool = setting(True, "normalize what branches read (false, for models that `runs export --llava` takes)", _MODEL)
    loss: Literal["softmax", "sigmoid"] = setting("softmax", "contrastive loss: CLIP's softmax or SigLIP's sigmoid form", _MODEL)
    init: Text | None = setting(
        None,
        f"begin with the weights of an aligner.pt: {_NAMED_INIT}. Of the modalities that both have, encoders must be equal, and so must "
        "dimension and hidden; another modality begins untrained",
        _INIT,
    )


class LoraSettings(SettingsGroup):
    """Low-rank adapters (arXiv:2106.09685), through peft."""

    rank: Width = setting(16, "rank of the adapters", _MODEL)
    alpha: PositiveInt = setting(32, "scale of the adapters: alpha / rank", _MODEL)
    dropout: Fraction = setting(
        0.0, "dropout on the adapters' input (on CPUs it halves the speed: masks are drawn for each)", _MODEL.but(trial=LIVE)
    )
    target_modules: str | list[str] = setting("all-linear", "modules that get an adapter, as peft takes them", _MODEL)


class InstructionModelSettings(SettingsGroup):
    """Phase 2: a causal language model that reads media through the aligner of phase 1."""

    language_model: ModelName = setting("smollm2-135m-instruct", f"{MODEL} of a causal language model", _MODEL.but(splits=True))
    encoders: EncodersSettings = EncodersSettings()  # the aligner's; one that is set says where that one is now
    init: Text | None = setting(
        None,
        f"begin with the weights of a model.pt, its aligner included: {_NAMED_INIT}. Language model, encoders, soft_tokens, recall_texts, "
        "recall_tokens, quantization, tuning (unless it was frozen), and LoRA's rank, alpha and target_modules must be equal",
        _INIT,
    )
    aligner: Text | None = setting(
        None,
        "path of an aligner.pt, a phase 1 run ID (or its start), or `latest` (default: `latest`; with model.init, the one in it)",
        _MODEL.but(splits=True),
    )
    train_aligner: bool = setting(False, "train the aligner on, instead of keeping it as phase 1 left it", _MODEL)
    projector: Literal["mlp", "linear"] = setting(
        "mlp", "from the shared space to the language model; `linear` is for models that `runs export --llava` takes", _MODEL
    )
    soft_tokens: Width | dict[str, Width] = setting(
        DEFAULT_SOFT_TOKENS,
        "soft tokens per image or clip, to which the encoder's output is averaged; by modality as `{image: 16, audio: 32}`",
        _MODEL.but(splits=True),
    )
    recall_tokens: Count = setting(
        0,
        "soft tokens more per image or clip, before the others, for each recalled text: the first words of the texts of phase 1 that are "
        "likeliest to belong to it; 0: nothing is recalled",
        _MODEL.but(splits=True),
    )
    recall_texts: Width = setting(2, "how many texts are recalled for each image or clip, the likeliest first", _MODEL.but(splits=True))
    recall_dropout: Fraction = setting(
        0.0,
        "share of items in each training step whose likeliest text is left out, so that the language model learns to use other evidence",
        _MODEL.but(trial=LIVE),
    )
    soft_token_dropout: Fraction = setting(0.0, "share of soft tokens that are blank in each training step", _MODEL.but(trial=LIVE))
    tuning: Literal["lora", "full", "frozen"] = setting("lora", "what trains in the language model", _MODEL)
    lora: LoraSettings = LoraSettings()
    quantization: Literal["nf4"] | None = setting(
        None,
        "keep the frozen language model's linear layers in 4 bits, a quarter of their memory in bf16 (QLoRA, arXiv:2305.14314); needs "
        "`pip install 'raytrain2p[quantization]'`",
        _MODEL.but(splits=True),
    )
    rate_factors: dict[Literal["aligner", "projector", "language_model"], PositiveFloat] = setting(
        {}, "parts that learn faster or slower, by times training.learning_rate: `{projector: 2, language_model: 0.5}`", _MODEL
    )
    system_prompt: str | None = setting(None, "system message; null leaves it to the tokenizer's chat template", _MODEL.but(splits=True))
    max_length: PositiveInt | None = setting(
        None, "longest record in tokens (default: the context of the language model)", _MODEL.but(splits=True)
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = setting(
        "auto", "attention kernel; `auto`: eager on CPUs (measured: 1.6x the speed of sdpa there), sdpa on GPUs", _MODEL.but(resume=FREE)
    )
    compile: bool = setting(
        False, "compile the language model's layers: shorter steps on GPUs, after a minute or more at the first", _MODEL.but(resume=FREE)
    )

    @model_validator(mode="after")
    def _rates_are_of_what_trains(self) -> "InstructionModelSettings":
        frozen = {} if self.train_aligner else {"aligner": "set model.train_aligner=true"}
        frozen |= {"language_model": "set model.tuning=lora or full"} if self.tuning == "frozen" else {}
        for part in frozen.keys() & self.rate_factors:
            raise ValueError(f"rate_factors names the {part.replace('_', ' ')}, which does not train: leave it out, or {frozen[part]}")
        return self

    @model_validator(mode="after")
    def _is_frozen_where_quantized(self) -> "InstructionModelSettings":
        if self.quantization is not None and self.tuning == "full":
            raise ValueError(f"quantization={self.quantization} keeps weights that do not train: set model.tuning=lora or frozen")
        if self.quantization is not None and self.compile:
            raise ValueError(f"quantization={self.quantization} cannot be compiled: set model.compile=false")
        return self

    def tokens_of(self, modality: str) -> int:
        """All soft tokens of an item of this modality."""
        return self.recall_texts * self.recall_tokens + self.soft_tokens_of(modality)

    def soft_tokens_of(self, modality: str) -> int:
        """Those to which the encoder's output is averaged."""
        if isinstance(self.soft_tokens, int):
            return self.soft_tokens
        return self.soft_tokens.get(modality, DEFAULT_SOFT_TOKENS)


class RunSettings(SettingsGroup):
    """What the settings of both phases share."""

    phase: ClassVar[Phase]
    accumulates: ClassVar[bool] = True  # whether the loss of a step stays the same over several passes

    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting(0, "seeds initial weights, data order and dropout", _MODEL.but(splits=True))
    data: DataSettings
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    launch: LaunchSettings = LaunchSettings()
    output: OutputSettings = OutputSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _fields_agree(self) -> "RunSettings":
        if problems := cross_field_problems(flatten(self), self.accumulates):
            raise InputError(problems)
        return self

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of workers that may train: those of the range among which the global batch can be divided."""
        training, launch = self.training, self.launch
        counts = range(launch.min_workers, min(launch.max_workers, training.global_batch_size) + 1)
        return [
            count for count in counts if not _batch_problems(training.global_batch_size, training.micro_batch_size, count, self.accumulates)
        ]


def cross_field_problems(flat: Mapping[str, Any], accumulates: bool) -> list[Problem]:
    """Settings that contradict each other.

    Args:
        flat: every setting by its dotted path. A value may be of a wrong type, which is reported elsewhere.
        accumulates: whether the loss of a step stays the same over several passes.
    """
    problems = []
    monitor = flat["checkpoint.monitor"]
    if monitor != "train_loss" and flat["data.val"] is None:
        what = "is measured on validation records, but data.val is not set"
        problems.append(Problem(f"checkpoint.monitor={monitor}", what, "set data.val, or checkpoint.monitor=train_loss"))
    size, micro, workers = flat["training.global_batch_size"], flat["training.micro_batch_size"], flat["launch.num_workers"]
    ends = workers if isinstance(workers, list) else [workers]
    if ends and all(type(number) is int and 0 < number <= MOST for number in (size, *ends, 1 if micro is None else micro)):
        find = _batch_problems if ends is not workers else _range_problems
        problems += find(size, micro, workers, accumulates)
    return problems + _placement_problems(flat, [number for number in ends if type(number) is int])


def _placement_problems(flat: Mapping[str, Any], ends: list[int]) -> list[Problem]:
    """What is asked of GPUs that are not used; GPUs that the workers of one run would share; and a group that changes its size, which is
    neither placed strictly nor sharded.

    Args:
        ends: the smallest number of workers and the largest, or their number.
    """
    use_gpu, share, kind = flat["launch.use_gpu"], flat["launch.gpus_per_worker"], flat["launch.accelerator_type"]
    problems = []
    if use_gpu is False and kind is not None:
        what = "names a GPU, and launch.use_gpu is false"
        problems.append(Problem(f"launch.accelerator_type={kind}", what, "set launch.use_gpu=true, or launch.accelerator_type=null"))
    if use_gpu is not False and type(share) is float and share < 1 and ends and ends[-1] > 1:
        what = f"{ends[-1]} workers of one run would share a GPU, which NCCL refuses"
        fix = "set launch.gpus_per_worker=1, launch.num_workers=1 or launch.use_gpu=false"
        problems.append(Problem(f"launch.gpus_per_worker={share:g} with launch.num_workers={flat['launch.num_workers']}", what, fix))
    if len(ends) == 2 and ends[0] < ends[1] and str(strategy := flat["launch.placement_strategy"]).startswith("STRICT"):
        fix = "take PACK or SPREAD, or a fixed launch.num_workers"
        problems.append(Problem(f"launch.placement_strategy={strategy} with launch.num_workers={ends}", "is for a fixed number", fix))
    if len(ends) == 2 and ends[0] < ends[1] and flat["launch.strategy"] == "fsdp":
        what = "checkpoints of sharded states are those of one number of workers"
        problems.append(Problem(f"launch.strategy=fsdp with launch.num_workers={ends}", what, "set launch.strategy=ddp, or a number"))
    if flat["launch.strategy"] == "fsdp" and (form := flat.get("model.quantization")) is not None:
        what = "weights in 4 bits are not sharded: each worker has all of them"
        problems.append(Problem(f"launch.strategy=fsdp with model.quantization={form}", what, "set launch.strategy=ddp"))
    return problems + _sharding_problems(flat["launch.strategy"], flat["launch.shard_workers"], ends)


def _sharding_problems(strategy: Any, shards: Any, ends: list[int]) -> list[Problem]:
    """Groups of workers that nothing is sharded among, or that leave some workers over."""
    where = f"launch.shard_workers={shards}"
    if shards is not None and strategy == "ddp":
        return [Problem(f"{where} with launch.strategy=ddp", "shards nothing", "set launch.strategy=fsdp, or launch.shard_workers=null")]
    if type(shards) is int and len(ends) == 1 and shards > 0 and ends[0] > 1 and ends[0] % shards:  # one worker shards nothing
        can = [count for count in range(1, min(ends[0], MOST_DIVIDED) + 1) if not ends[0] % count]
        what = f"{ends[0]} workers cannot be divided into groups of {shards}"
        return [Problem(f"{where} with launch.num_workers={ends[0]}", what, f"sizes that can: {_nearest(can, [shards, shards])}")]
    return []


def _range_problems(size: int, micro: int | None, ends: list[int], accumulates: bool) -> list[Problem]:
    """Ends of a range of workers among which the global batch cannot be divided, with the nearest numbers that can. Numbers between
    the ends are left out where they cannot."""
    wrong = [str(end) for end in dict.fromkeys(ends) if _batch_problems(size, micro, end, accumulates)]
    if not wrong:
        return []
    can = [count for count in range(1, min(size, MOST_DIVIDED) + 1) if not _batch_problems(size, micro, count, accumulates)]
    within = [count for count in can if ends[0] <= count <= ends[1]]
    fix = f"numbers of workers that can: {_nearest(can, ends)}"
    if within:
        fix = f"set launch.num_workers={[within[0], within[-1]] if len(within) > 1 else within[0]}"
    of = f"training.global_batch_size={size}" + (f", training.micro_batch_size={micro}" if micro is not None else "")
    what = f"{size} records cannot be divided evenly among {' and '.join(wrong)} workers"
    return [Problem(f"launch.num_workers={ends} with {of}", what, fix)]


def _nearest(numbers: list[int], ends: list[int]) -> str:
    below, above = [one for one in numbers if one < ends[0]], [one for one in numbers if one > ends[1]]
    return ", ".join(str(one) for one in [*below[-2:], *above[:2]])


def _batch_problems(size: int, micro: int | None, workers: int, accumulates: bool) -> list[Problem]:
    """A global batch that cannot be divided among workers and passes, with the nearest numbers that can."""
    problems = []
    if size % workers:
        unit = workers * micro if micro and accumulates else workers
        problems.append(
            Problem(
                f"launch.num_workers={workers} with training.global_batch_size={size}",
                f"{size} records cannot be divided evenly among {workers} workers",
                f"set training.global_batch_size={_either(size // unit * unit, size // unit * unit + unit)}",
            )
        )
    if micro is None:
        return problems
    if not accumulates and micro * workers != size:
        what = "phase 1's loss compares all records of one pass: over several passes, it would change with the number of workers"
        fix = "set training.micro_batch_size=null: one pass over training.global_batch_size / launch.num_workers records"
        problems.append(Problem(f"training.micro_batch_size={micro}", what, fix))
    elif size % workers == 0 and (part := size // workers) % micro:
        divisors = sorted({one for low in range(1, math.isqrt(part) + 1) if part % low == 0 for one in (low, part // low)})
        nearest = [*[number for number in divisors if number < micro][-1:], *[number for number in divisors if number > micro][:1]]
        problems.append(
            Problem(
                f"training.micro_batch_size={micro}",
                f"does not divide the {part} records of each worker (training.global_batch_size={size}, launch.num_workers={workers})",
                f"set training.micro_batch_size={_either(*nearest)}",
            )
        )
    return problems


def _either(*numbers: int) -> str:
    return " or ".join(str(number) for number in numbers if number > 0)


class AlignmentSettings(RunSettings):
    """Settings of a phase 1 run."""

    phase: ClassVar[Phase] = ALIGNMENT
    accumulates: ClassVar[bool] = False  # the contrastive loss compares all records of one pass

    model: AlignmentModelSettings = AlignmentModelSettings()


class InstructionSettings(RunSettings):
    """Settings of a phase 2 run."""

    phase: ClassVar[Phase] = INSTRUCTION

    model: InstructionModelSettings = InstructionModelSettings()


Settings = AlignmentSettings | InstructionSettings
SETTINGS_OF_PHASE: dict[int, type[AlignmentSettings] | type[InstructionSettings]] = {1: AlignmentSettings, 2: InstructionSettings}


def flatten(settings: SettingsGroup) -> dict[str, Any]:
    """Every setting by its dotted path, in the order of definition: `{"training.global_batch_size": 16, ...}`."""
    return flatten_tree(settings.model_dump(mode="json"))


def flatten_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted paths, for example the settings in a config.json. A group that is not used is null at its own path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten_tree(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return flat
