"""The configuration of a run: frozen dataclasses, and every check that needs no data.

Neither this module nor config_io, which reads and writes it as YAML, imports JAX or anything of the
project that does, so that a mistake in a config is reported before any device is touched.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

from mixtral_jax.checks import InputError, check_above_zero, check_at_least, check_choice


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says what to do. The exit code is 1."""


LEAST = 2.0**-126  # float32's smallest normal number: on devices a smaller one is 0
ONE = 1 - 2.0**-25  # and what is not below this is 1
EXCHANGES = ("local", "padded", "ragged")
ATTENTIONS = ("xla", "splash", "cudnn", "chunks")
GROUPED_MATMULS = ("megablox", "ragged_dot", "hopper", "blocks")
REMAT_POLICIES = (
    *("none", "full", "attention_out", "no_experts", "no_up", "no_down", "matmuls"),
    "matmuls_rows",
)
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of a Mixtral. Names are Hugging Face's; defaults are Mixtral 8x7B.

    Source: arXiv 2401.04088 table 1 and the released config.json.
    """

    preset: str = ""
    """Name of a released model whose sizes are the defaults: mixtral_8x7b or mixtral_8x22b."""
    checkpoint: str = ""
    """A folder with weights to start from, in any form that generate.py takes; its sizes, and its
    tokenizer if it has one, are the run's. Empty starts from random weights."""
    vocab_size: int = 32000
    """Rows of the embedding and columns of the head (V)."""
    hidden_size: int = 4096
    """Width of the residual stream (D)."""
    intermediate_size: int = 14336
    """Hidden width of one expert (F)."""
    num_hidden_layers: int = 32
    """Layers of attention and experts, one after another."""
    num_attention_heads: int = 32
    """Query heads (N)."""
    num_key_value_heads: int = 8
    """Key and value heads (K); each serves N / K query heads."""
    head_dim: int | None = None
    """Width of one head (H); empty means hidden_size / num_attention_heads."""
    num_local_experts: int = 8
    """Experts per layer (E)."""
    num_experts_per_tok: int = 2
    """Experts that each token visits (C, the paper's k)."""
    rope_theta: float = 1e6
    """Base of the rotary position embedding: pair i of H / 2 turns by base^(-2i / H) a position."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square that RMSNorm divides by the root of."""
    max_position_embeddings: int = 32768
    """Longest sequence, in tokens, for training and for prompt plus answer."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    compute_dtype: str = ""
    """Type of activations: float32 or bfloat16; empty is float32 on CPU and bfloat16 elsewhere."""
    param_dtype: str = "float32"
    """Type of weights and optimizer state: float32, or bfloat16, rounded at random in each step."""
    remat: str = "none"
    """What the backward pass recomputes: none keeps everything, full only each layer's input;
    matmuls keeps the results of matrix products and of attention, matmuls_rows also the rows that
    reach the experts; no_down, no_up and no_experts keep less than matmuls by the experts' down
    product, that and up, or all three; attention_out what attention adds to the residual stream."""
    scan_layers: bool = True
    """Compile one layer and loop over it; false unrolls (slower to compile, sometimes faster)."""
    exchange: str = ""
    """How rows reach their experts: local, padded or ragged; empty means the platform's best."""
    receive_factor: float | None = None
    """Rows that a device has room to receive, over those that balanced experts would send it; what
    does not fit is dropped and counted. Empty is room for the worst case: nothing is dropped."""
    attention: str = ""
    """Where there is no cache, as in training: xla, splash (TPU), cudnn (GPU) or chunks (CPU);
    empty means the best."""
    grouped_matmul: str = ""
    """The experts' products: megablox (TPU), hopper (H100, H200), ragged_dot or blocks; empty means
    the best."""
    capacity_factor: float | None = None
    """Empty means dropless. Otherwise each device sends at most
    ceil(capacity_factor * tokens * k / E) rows to each expert and drops (and counts) the rest."""
    load_balance_weight: float = 0.02
    """Weight of the load-balancing loss, whose value is k when balanced."""
    router_z_weight: float = 0.0
    """Weight of the mean squared logsumexp of the router logits."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes += ("num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts")
        sizes += ("num_experts_per_tok", "max_position_embeddings")
        check_at_least(self, "model", 1, *sizes)
        check_at_least(
            self, "model", 0, "load_balance_weight", "router_z_weight", "initializer_range"
        )
        check_at_least(self, "model", LEAST, "rope_theta", "rms_norm_eps")
        check_choice("model.preset", self.preset, ("", *PRESETS))
        check_choice("model.remat", self.remat, REMAT_POLICIES)
        check_choice("model.exchange", self.exchange, ("", *EXCHANGES))
        check_choice("model.attention", self.attention, ("", *ATTENTIONS))
        check_choice("model.grouped_matmul", self.grouped_matmul, ("", *GROUPED_MATMULS))
        check_choice("model.compute_dtype", self.compute_dtype, ("", *DTYPES))
        check_choice("model.param_dtype", self.param_dtype, DTYPES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}: set model.head_dim"
            )
        if self.head_size % 2:
            raise InputError(f"model.head_dim={self.head_size} must be even: RoPE turns halves")
        if self.num_experts_per_tok > self.num_local_experts:
            raise InputError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"model.num_local_experts={self.num_local_experts}"
            )
        bounds = "capacity_factor", "receive_factor"
        check_above_zero(self, "model", *bounds, empty="; empty is dropless")

    def dropless(self) -> ModelConfig:
        """The same model as it should be sampled: no token dropped, nothing chosen for training."""
        undone = {"capacity_factor": None, "receive_factor": None, "remat": "none"}
        return dataclasses.replace(self, **undone, attention="", grouped_matmul="")

    @property
    def head_size(self) -> int:
        """Width of one attention head (H)."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """All parameters: L (2DH(N+K) + 3EDF + DE + 2D) + 2VD + D."""
        return self._parameters(self.num_local_experts)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts: int) -> int:
        d, f, h = self.hidden_size, self.intermediate_size, self.head_size
        attention = 2 * d * h * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * experts * d * f + d * self.num_local_experts + 2 * d
        return self.num_hidden_layers * layer + 2 * self.vocab_size * d + d


PRESETS: dict[str, dict[str, typing.Any]] = {
    "mixtral_8x7b": {},
    "mixtral_8x22b": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65536,
        "load_balance_weight": 0.001,
    },
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    """Copies of the weights, each with its share of the batch."""
    fsdp: int = 1
    """Slices of every weight's model dimension, gathered where used; also splits the batch."""
    expert: int = 1
    """Groups of experts; outside the experts it splits the batch like fsdp."""
    tensor: int = 1
    """Slices of heads, vocabulary and the experts' hidden dimension."""

    def __post_init__(self) -> None:
        check_at_least(self, "mesh", 1, "data", "fsdp", "expert", "tensor")

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.expert * self.tensor

    @property
    def batch_shards(self) -> int:
        """Devices that the batch is split over."""
        return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class TrainingConfig:
    """The optimization: how long, how much at a time, how fast."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences in a step, over all devices and all microbatches."""
    sequence_length: int = 512
    """Tokens in a sequence (L)."""
    gradient_accumulation: int = 1
    """Microbatches that a step is cut into, one after another."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """What follows the warm-up: cosine, linear, constant or warmup_stable_decay."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0 to its peak, in a line."""
    decay_fraction: float = 0.2
    """Share of the steps that warmup_stable_decay spends decaying, at the end."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate after the last step over its peak, for every schedule but constant."""
    weight_decay: float = 0.1
    """AdamW's decay; on matrices only."""
    adam_beta1: float = 0.9
    """Decay a step of AdamW's mean of gradients."""
    adam_beta2: float = 0.95
    """Decay a step of AdamW's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the root of that mean, which the update is divided by."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    z_loss_weight: float = 0.0
    """Weight of the mean squared logsumexp of the output logits."""
    log_every: int = 10
    """Steps between training lines of metrics.jsonl; the last step has one too, and one that a
    signal stops the run at."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step has one too."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay, beside the best one."""
    validate_every: int = 500
    """Steps between validations, beside those at checkpoints; 0 switches validation off."""
    validation_batches: int = 20
    """Batches of held-out text scored each time."""
    max_skipped_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops."""
    profile_steps: str = ""
    """first:last, the steps to trace into the run folder; empty for none."""

    def __post_init__(self) -> None:
        whole = ("batch_size", "sequence_length", "gradient_accumulation", "steps", "log_every")
        whole += ("checkpoint_every", "keep_checkpoints", "validation_batches", "max_skipped_steps")
        check_at_least(self, "training", 1, *whole)
        check_at_least(self, "training", 0, "warmup_steps", "validate_every", "learning_rate")
        check_at_least(self, "training", 0, "weight_decay", "z_loss_weight")
        check_at_least(self, "training", LEAST, "adam_eps")  # an unused row's update would be 0 / 0
        check_at_least(self, "training", LEAST if self.clip_norm else 0, "clip_norm")
        check_choice("training.schedule", self.schedule, SCHEDULES)
        for name in ("decay_fraction", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"training.{name}={getattr(self, name)} must lie in 0..1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < ONE:
                raise InputError(f"training.{name}={getattr(self, name)} must lie in 0..1, below 1")
        if self.batch_size % self.gradient_accumulation:
            raise InputError(
                f"training.gradient_accumulation={self.gradient_accumulation} does not divide "
                f"training.batch_size={self.batch_size}"
            )
        self.profile_range  # noqa: B018  (checks the text)

    @property
    def profile_range(self) -> tuple[int, int] | None:
        """First and last step to trace, or None."""
        if not self.profile_steps:
            return None
        try:
            first, last = (int(part) for part in self.profile_steps.split(":"))
            if not 1 <= first <= last:
                raise ValueError
        except ValueError:
            raise InputError(
                f"training.profile_steps={self.profile_steps!r} must look like 10:12"
            ) from None
        return first, last


@dataclass(frozen=True)
class SourceConfig:
    """Some files of text and how often to draw from them."""

    files: str = ""
    """A glob; ** crosses folders; {stdlib} stands for the running Python's standard library.
    .jsonl (or .ndjson) and .parquet files hold one document a line or row in the field `text`;
    every other file is one document, but .json is refused."""
    weight: float = 1.0
    """Share of the documents drawn from this source, relative to the others; empty ones count."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    source: str = "files"
    """files, or synthetic: random tokens made on the spot, for benchmarks."""
    train: tuple[SourceConfig, ...] = ()
    """A glob, a list of globs, or a list of {files: GLOB, weight: W}; a file that several of them
    name belongs to the first."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out text, written like train but without weights, and never trained on; empty takes
    validation_fraction of train's documents."""
    validation_fraction: float = 0.02
    """Share of the documents of train that are held out when validation is empty."""
    tokenizer: str = ""
    """A SentencePiece model file; mistral-v1, -v2 or -v3, which the package mistral-common holds;
    or train: make one of model.vocab_size pieces from the data, unless model.checkpoint has one."""
    interleave: int = 16
    """Documents that each row of the batch has open, taking a sequence of each in turn: more makes
    consecutive steps less alike where documents are long."""
    malformed: str = "skip"
    """What a line that cannot be read does: skip (counted and named) or error."""

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, ("files", "synthetic"))
        check_at_least(self, "data", 1, "interleave")
        check_choice("data.malformed", self.malformed, ("skip", "error"))
        if not 0 <= self.validation_fraction < 1:
            fraction = f"data.validation_fraction={self.validation_fraction}"
            raise InputError(f"{fraction} must be at least 0 and below 1")
        for key in ("train", "validation"):
            for source in getattr(self, key):
                if not source.files:
                    raise InputError(f"data.{key}: a source needs files: GLOB")
                if not source.weight > 0:
                    raise InputError(
                        f"data.{key}: weight={source.weight} of {source.files} must be above 0"
                    )


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its files, and its randomness."""

    dir: str = ""
    """The run folder; empty means runs/ and the config file's name."""
    seed: int = 0
    """Seeds the weights and the order of the documents."""
    resume_step: int | None = None
    """Resume from this checkpoint instead of the newest; newer ones are moved aside."""

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"run.seed={self.seed} must be a number of 64 bits")


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_mesh(self.model, self.mesh)
        microbatch = self.training.batch_size // self.training.gradient_accumulation
        if microbatch % self.mesh.batch_shards:
            raise InputError(
                f"training.batch_size / training.gradient_accumulation = {microbatch} sequences "
                f"do not split over mesh.data * mesh.fsdp * mesh.expert = {self.mesh.batch_shards}"
            )
        if self.training.sequence_length > self.model.max_position_embeddings:
            raise InputError(
                f"training.sequence_length={self.training.sequence_length} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        tokenizer = self.data.tokenizer or self.model.checkpoint
        if self.data.source == "files" and self.data.train and not tokenizer:
            raise InputError(
                "data.tokenizer is empty: name a SentencePiece model file, or write "
                "data.tokenizer=train to make one from the data"
            )


def check_mesh(model: ModelConfig, mesh: MeshConfig) -> None:
    """Every model size must split over the mesh axes that it is sharded on.

    Raises:
      InputError: naming the axis and the size that it does not divide.
    """
    dense = mesh.fsdp * mesh.expert
    rules = (
        ("mesh.expert", mesh.expert, "num_local_experts", model.num_local_experts),
        ("mesh.fsdp * mesh.expert", dense, "hidden_size", model.hidden_size),
        ("mesh.tensor", mesh.tensor, "num_key_value_heads", model.num_key_value_heads),
        ("mesh.tensor", mesh.tensor, "intermediate_size", model.intermediate_size),
        ("mesh.tensor", mesh.tensor, "vocab_size", model.vocab_size),
    )
    for axis, parts, name, size in rules:
        if size % parts:
            raise InputError(f"{axis}={parts} does not divide model.{name}={size}")
    if mesh.expert > 1 and model.exchange == "local":
        raise InputError(
            f"model.exchange=local cannot reach experts on other devices (mesh.expert="
            f"{mesh.expert}): use padded or ragged, or mesh.expert=1"
        )
