"""Configuration of the balanced_sparsity app: model, data, training, pruning, the sweep's grid, sparsify, serving, Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from actors.cluster.session import RayConfig
from apps.program.config import Config

ModelName = Literal["vgg", "speech_lstm", "word_lstm", "speaker_encoder"]
DataName = Literal[
    "digits", "cifar10", "image_folder", "digit_rows", "spoken_digits", "timit_phones", "docstrings", "text", "speakers"
]
DATA_OF_MODEL: dict[ModelName, tuple[DataName, ...]] = {
    "vgg": ("digits", "cifar10", "image_folder"),
    "speech_lstm": ("digit_rows", "spoken_digits", "timit_phones"),
    "word_lstm": ("docstrings", "text"),
    "speaker_encoder": ("speakers",),
}


class VggConfig(Config):
    """Of the convolutional network; VGG-16 is stages [[64,64],[128,128],[256,256,256],[512,512,512],[512,512,512]], hidden
    [4096,4096], pooled 7, dropout 0.5."""

    stages: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64))
    hidden: tuple[int, ...] = ()
    pooled: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_norm: bool = True

    @model_validator(mode="after")
    def _widths(self) -> VggConfig:
        if not self.stages or not all(self.stages) or min(min(stage) for stage in self.stages) < 1:
            raise ValueError("stages must be lists of channel counts, none of them empty")
        if self.hidden and min(self.hidden) < 1:
            raise ValueError("hidden must hold widths of at least 1")
        return self


class LstmConfig(Config):
    """Of the LSTMs. Zaremba: medium is hidden 650, dropout 0.5, initial 0.05; large hidden 1500, dropout 0.65, initial 0.04."""

    hidden: int = Field(default=128, ge=1)
    layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    initial: float = Field(default=0.1, gt=0)
    """Weights of the language model are drawn from [-initial, initial]."""


class ModelConfig(Config):
    """Which network, and its sizes."""

    name: ModelName = "vgg"
    vgg: VggConfig = VggConfig()
    lstm: LstmConfig = LstmConfig()
    weights: str | None = None
    """The speaker encoder's published weights; null: those of the installed package resemblyzer."""


class DataConfig(Config):
    """Which data, and where it lies. ``digits``, ``digit_rows`` and ``docstrings`` are embedded."""

    name: DataName = "digits"
    train: str | None = None
    """Folder, archive or file that is trained on."""
    test: str | None = None
    """What is only evaluated; null: the data's own split, or the last part of each text."""
    more_speech: str | None = None
    """Speech without speakers that the speaker encoder recovers on, too."""
    limit: int | None = Field(default=None, ge=1)
    """Examples (tokens of a text) that are trained on at most."""
    shift: int = Field(default=0, ge=0)
    """Images are moved by up to so many pixels and mirrored; 0: neither (digits must not be mirrored)."""
    size: int = Field(default=224, ge=8)
    """Side of the crops of ``image_folder``."""
    threads: int = Field(default=4, ge=1)
    """Decoders of ``image_folder``."""
    vocabulary: int = Field(default=10_000, ge=2)
    """Words that keep their names; the others are <unk>."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Part of each text that is evaluated where ``test`` is null."""
    sequence: int = Field(default=35, ge=1)
    """Time steps of a training sequence of text, frames (times 10 ms) of the speaker encoder's."""


class TrainingConfig(Config):
    """How long, with what, on how many workers."""

    steps: int = Field(default=300, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    """Instead of ``steps``."""
    batch: int = Field(default=64, ge=1)
    """Examples of a step, of all workers together."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay: float = Field(default=1.0, ge=1)
    """``step``: the rate is divided by this for every epoch after ``decay_after_epochs``."""
    decay_after_epochs: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    seed: int = Field(default=1, ge=0)
    report_every: int = Field(default=20, ge=1)
    """Steps between reports of the loss."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; null: at the end alone."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: at the end alone. At a multiple of ``report_every``."""
    workers: int = Field(default=1, ge=0)
    """Workers of Ray Train; 0: in this process, without Ray."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a worker."""
    gpu: bool = False
    storage: str | None = None
    """Where Ray Train keeps checkpoints, reachable from all nodes; null: the run folder."""
    max_failures: int = Field(default=0, ge=-1)
    """Errors of the loop itself that are tried again; faults of machines are C4's and always are."""


class PruningConfig(Config):
    """What is pruned, how far and how gradually."""

    pattern: str = "balanced:32"
    """balanced:B (k of every B columns), balanced:BxV (V rows choose together), unstructured, block:RxC, or 2:4."""
    sparsity: float = Field(default=0.75, ge=0, lt=1)
    initial: float = Field(default=0.0, ge=0, lt=1)
    kind: Literal["paper", "cubic", "linear"] = "cubic"
    """How the sparsity rises."""
    begin_step: int = Field(default=0, ge=0)
    rise_steps: int = Field(default=150, ge=0)
    """Steps over which it rises; 0: at once (one shot)."""
    every: int = Field(default=10, ge=1)
    """Steps between two rises."""
    retrain_steps: int = Field(default=150, ge=0)
    """Steps at the final sparsity."""
    learning_rate: float | None = Field(default=None, gt=0)
    """While pruning; null: training's."""
    skip: tuple[str, ...] = ()
    """Names of modules (and what is in them) that stay dense."""

    @property
    def steps(self) -> int:
        """All steps of a pruning run."""
        return self.begin_step + self.rise_steps + self.retrain_steps


class SweepConfig(Config):
    """The grid of ``sweep``: each pattern at each sparsity; balanced ones and blocks at each of their sizes, too."""

    patterns: tuple[Literal["balanced", "unstructured", "block"], ...] = ("balanced", "unstructured", "block")
    sparsities: tuple[float, ...] = (0.5, 0.75, 0.9)
    balanced_blocks: tuple[int, ...] = (16, 32, 64)
    block_sizes: tuple[str, ...] = ("8x8",)
    seeds: tuple[int, ...] = (1,)
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; null: as many as there are CPUs."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    gpus_per_trial: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _in_range(self) -> SweepConfig:
        if not self.patterns or not self.sparsities or not self.seeds:
            raise ValueError("patterns, sparsities and seeds must each hold at least one")
        if not all(0 <= value < 1 for value in self.sparsities):
            raise ValueError("sparsities must be in [0, 1)")
        return self


class SparsifyConfig(Config):
    """How `sparsify` prunes a language model of the serving engine; pattern and sparsity are those of ``pruning``."""

    text: str | None = None
    """Text file that is pruned and recovered on; null: the docstrings of Python's library."""
    test: str | None = None
    """Text file that perplexity is measured on; null: the last tenth of ``text``, which is held out then."""
    sequences: int = Field(default=16, ge=1)
    """Sequences of ``text`` at most, from all over it."""
    test_sequences: int = Field(default=8, ge=1)
    tokens: int = Field(default=256, ge=2)
    """Of a sequence."""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    value_type: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    reconstruct: bool = True
    """Fit what is kept to what the dense layer computes."""
    steps: int = Field(default=20, ge=0)
    """Of distillation from the dense model; 0: none."""
    batch: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    seed: int = Field(default=0, ge=0)
    skip_layers: tuple[int, ...] = ()
    """Numbers of layers that stay dense."""
    threads: int = Field(default=2, ge=1)


class ServingConfig(Config):
    """How `serve` answers the streams of an LSTM."""

    app_name: str = "balanced_lstm"
    """Name of the Serve application."""
    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=1, le=65535)
    shards: int = Field(default=1, ge=1)
    """Processes that hold streams; a stream stays in the one that its name says."""
    max_streams: int = Field(default=1024, ge=1)
    """Open at once in a shard."""
    evict_after_idle_s: float = Field(default=60.0, ge=0)
    """In a full shard, the stream unused for longest is closed for a new one if it was unused for so long; else 429."""
    max_frames: int = Field(default=256, ge=1)
    """Of one request: the shard's other streams wait for them."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    threads: int = Field(default=1, ge=1)
    """CPU threads of a shard."""


class BalancedSparsityConfig(Config):
    """``python -m apps.balanced_sparsity VERB [--config configs/balanced_sparsity/<preset>.yaml] [key=value ...]``."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    pruning: PruningConfig = PruningConfig()
    sweep: SweepConfig = SweepConfig()
    sparsify: SparsifyConfig = SparsifyConfig()
    serving: ServingConfig = ServingConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> BalancedSparsityConfig:
        allowed = DATA_OF_MODEL[self.model.name]
        if self.data.name not in allowed:
            raise ValueError(
                f"model.name {self.model.name} takes data.name {' or '.join(allowed)}, not {self.data.name}"
            )
        if self.training.workers > 1 and self.training.batch % self.training.workers:
            raise ValueError(
                f"training.batch {self.training.batch} cannot be divided among training.workers {self.training.workers}"
            )
        return self
