"""Configurations: frozen, keyword-only dataclasses that validate themselves before any process group exists."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lasp.fields import (
    Count,
    CountOrZero,
    FieldName,
    FilePath,
    Name,
    Seconds,
    Seed,
    as_json,
    check_fields,
    from_dict,
    require,
    with_defaults,
)
from lasp.model_config import (
    DELTA,
    LEVELS,
    LINEAR,
    LOG_LINEAR,
    MIXERS,
    OPTIONAL_CONV,
    SOFTMAX,
    FeatureMap,
    Mixer,
    ModelConfig,
    Pattern,
)
from lasp.names import ExchangeName, LayoutName, SoftmaxName
from lasp.notation import Stage, read_stage
from lasp.settings import DataConfig, DeepSpeedConfig, OptimizerConfig

__all__ = [
    "DELTA",
    "LEVELS",
    "LINEAR",
    "LOG_LINEAR",
    "MIXERS",
    "OPTIONAL_CONV",
    "SOFTMAX",
    "DataConfig",
    "DeepSpeedConfig",
    "FeatureMap",
    "Mixer",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Pattern",
    "TrainConfig",
    "as_json",
    "from_dict",
    "require",
    "require_empty",
    "with_defaults",
]


def require_empty(output: str | Path) -> Path:
    """The folder `output`. Raises ValueError if there is anything in it, or if it is no folder."""
    path = Path(output)
    empty = not any(path.iterdir()) if path.is_dir() else not path.exists()
    require(empty, "output", str(output), "a new or empty directory")
    return path


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work: data_parallel groups, each splitting its contexts over sequence_parallel ranks."""

    sequence_parallel: Count | None = 1  # what the world leaves: world size / (data_parallel or 1), if None
    data_parallel: Count | None = None  # what the world leaves: world size / sequence_parallel, if None
    layout: LayoutName = "contiguous"  # of a context over ranks; zigzag gives all the same share of softmax layers
    state_exchange: ExchangeName = "auto"  # how linear layers' states travel
    softmax: SoftmaxName = "auto"  # how ranks share softmax layers
    expert_parallel: Count = 1  # ranks that share the experts of a mixture between them, of whichever groups above
    fsdp: bool = True  # parameters, gradients and optimiser states sharded over all ranks (FSDP2)
    timeout: Seconds = 600.0  # seconds after which a collective that a rank does not join ends the run

    def __post_init__(self) -> None:
        check_fields(self)

    def mesh_shape(self, world_size: int) -> tuple[int, int]:
        """(data_parallel, sequence_parallel) in a world of this size; ValueError if they do not make it up."""
        data = self.data_parallel
        sequence = max(1, world_size // (data or 1)) if self.sequence_parallel is None else self.sequence_parallel
        for field, ranks in (("sequence_parallel", sequence), ("expert_parallel", self.expert_parallel)):
            require(world_size % ranks == 0, field, ranks, f"a divisor of the world size {world_size}")
        if data is None:
            return world_size // sequence, sequence
        expected = f"world size / sequence_parallel = {world_size} / {sequence}"
        require(data * sequence == world_size, "data_parallel", data, expected)
        return data, sequence


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. A step sees batch_contexts contexts of context_length tokens each, over the whole world."""

    model: ModelConfig
    data: DataConfig
    run_dir: FilePath  # checkpoints, metrics and plots
    steps: Count  # of the optimiser
    context_length: Count  # tokens
    curriculum: tuple[Stage, ...] = ()  # stages before that, LENGTH:STEPS, of shorter contexts; as many tokens a step
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["native", "deepspeed"] = "native"  # who holds the weights and updates them
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    initial_weights: FilePath | None = None  # a directory of `lasp import`, or a checkpoint, to begin from
    optimizer: OptimizerConfig = OptimizerConfig()
    batch_contexts: Count = 1  # gradients are accumulated over those of a data-parallel group
    contexts_at_once: Count = 1  # so many of these in one forward and backward; more of short contexts fill a GPU
    segment_tokens: Count | None = None  # over all ranks: contexts are streams of segments of so many; None: whole
    segment_offload: bool = False  # what segments hand on to each other waits in the host's memory
    segment_graphs: Count | None = None  # so many at the end are computed once; None: as recompute=auto has it, else 1
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of the compute; bfloat16 keeps float32 parameters
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs if every rank can have one
    # What is kept of layers' activations until backward (lasp.models.recompute); auto: as much as fits. Of older runs
    # True is full, False none.
    recompute: Literal["auto", "none", "selective", "full"] | bool = "auto"
    recompute_layers: CountOrZero | None = None  # so many follow that policy, the others the one before it; all if None
    offload_activations: bool = False  # inputs of layers that are recomputed wait in the host's memory
    eval_every: Count = 100  # steps
    checkpoint_every: Count = 1000  # steps; the last step is always saved
    checkpoint_keep: Count = 2  # the newest
    checkpoint_keep_every: CountOrZero = 0  # steps, besides: checkpoints of their multiples stay for good; 0: none
    checkpoint_async: bool = False  # written beside the next steps, from a copy in CPU memory
    checkpoint_timeout: Seconds = 3600.0  # of a save, or of loading; messages of steps have parallel.timeout
    skip_nonfinite: CountOrZero = 0  # steps in a row that may be left out because loss or gradient are not finite
    compare_replicas_every: CountOrZero = 100  # steps; 0: ranks never compare the weights that several of them hold
    seed: Seed = 0  # of weights and of the order of documents
    log_every: Count = 10  # steps that are logged together at most, and between lines where there is no terminal
    profile: bool = False  # traces the steps 3 to 5 of this start (lasp.training.profile)
    wandb: Name | None = None  # a project of Weights & Biases that gets the metrics, too
    allow_changed: tuple[FieldName, ...] = ()  # fields whose values may differ from the checkpoint's: "seed", "data", …

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.recompute, bool):
            object.__setattr__(self, "recompute", "full" if self.recompute else "none")
        offloads = self.offload_activations and self.recompute == "none"
        require(not offloads, "offload_activations", True, "False with recompute='none', where nothing is recomputed")
        layers, most = self.recompute_layers, self.model.num_layers
        require(layers is None or layers <= most, "recompute_layers", layers, f"at most num_layers={most}, or None")
        free = layers is None or self.recompute in ("selective", "full")
        require(free, "recompute_layers", layers, f"None with recompute={self.recompute!r}")
        require(self.context_length >= 2, "context_length", self.context_length, "at least 2")
        full = self.dtype != "bfloat16"
        self._require_segments()
        self._require_contexts_at_once()
        self._require_levels()
        self._require_curriculum()
        if self.engine == "deepspeed":
            require(not self.parallel.fsdp, "fsdp", True, "False with engine='deepspeed' (ZeRO does the sharding)")
            require(self.dtype != "float64", "dtype", self.dtype, "float32 or bfloat16 with engine='deepspeed'")
            require(full or self.deepspeed.stage > 0, "stage", 0, "at least 1 in bfloat16, for its float32 weights")
            require(self.model.num_experts == 0, "num_experts", self.model.num_experts, "0 with engine='deepspeed'")
            require(not self.checkpoint_async, "checkpoint_async", True, "False with engine='deepspeed'")
            expected = "0 with engine='deepspeed' (it knows of a gradient when it has used it)"
            require(self.skip_nonfinite == 0, "skip_nonfinite", self.skip_nonfinite, expected)
        else:
            require(
                self.deepspeed == DeepSpeedConfig(), "deepspeed", self.deepspeed, "its defaults with another engine"
            )
        require(
            full or self.parallel.fsdp or self.engine == "deepspeed",
            "dtype",
            self.dtype,
            "float32 or float64 without fsdp (it does the casts)",
        )
        experts, ranks = self.model.num_experts, self.parallel.expert_parallel
        require(ranks == 1 or experts > 0, "expert_parallel", ranks, "1 for a model without experts")
        require(experts % ranks == 0, "num_experts", experts, f"a multiple of expert_parallel={ranks}")
        if self.parallel.sequence_parallel is not None:
            self._require_heads_for(self.parallel.sequence_parallel)
            self._require_units_for(self.parallel.sequence_parallel)

    def _require_segments(self) -> None:
        """Raises ValueError unless contexts can be trained in segments as asked for."""
        if self.segment_tokens is None:
            require(not self.segment_offload, "segment_offload", True, "False without segment_tokens")
            require(self.segment_graphs is None, "segment_graphs", self.segment_graphs, "None without segment_tokens")
            return
        most = f"at most context_length={self.context_length}, or None"
        require(self.segment_tokens <= self.context_length, "segment_tokens", self.segment_tokens, most)
        require(self.engine == "native", "segment_tokens", self.segment_tokens, f"None with engine={self.engine!r}")

    def _require_contexts_at_once(self) -> None:
        """Raises ValueError where contexts have to be computed one at a time, but are not to be."""
        for one, where in (
            (self.segment_tokens is not None, "with segment_tokens"),
            (self.engine == "deepspeed", "with engine='deepspeed'"),
            (self.model.num_experts > 0, "for a model with experts, whose loads are balanced in each context"),
        ):
            require(not one or self.contexts_at_once == 1, "contexts_at_once", self.contexts_at_once, f"1 {where}")

    def _require_levels(self) -> None:
        """Raises ValueError unless states of levels, if there are any, serve the context and can be sent."""
        if self.model.aligned:
            longest, mixer, exchange = 1 << (LEVELS - 1), self.model.mixer, self.parallel.state_exchange
            expected = f"at most {longest}, which the {LEVELS} levels of {mixer} address"
            require(self.context_length <= longest, "context_length", self.context_length, expected)
            expected = f"'auto' or 'all_gather' for {mixer}, whose states are several"
            require(exchange in ("auto", "all_gather"), "state_exchange", exchange, expected)

    def _require_curriculum(self) -> None:
        """Raises ValueError unless every stage's contexts make up whole ones."""
        for stage in self.curriculum:
            length, _ = read_stage(stage)
            fits = length > 1 and self.context_length % length == 0
            require(
                fits, "curriculum", stage, f"a length of at least 2 that divides context_length={self.context_length}"
            )
            segments = self.segment_tokens or 0
            require(length >= segments, "curriculum", stage, f"a length of at least segment_tokens={segments}")
        if self.engine == "deepspeed":
            require(not self.curriculum, "curriculum", self.curriculum, "none with engine='deepspeed'")

    def context_length_at(self, step: int) -> int:
        """How long contexts are in step 0, 1, 2, …"""
        for length, steps in map(read_stage, self.curriculum):
            if step < steps:
                return length
            step -= steps
        return self.context_length

    def _require_units_for(self, ranks: int) -> None:
        """Raises ValueError unless every segment has a token for each unit of so many ranks."""
        if self.segment_tokens is not None:
            units = ranks * (2 if self.parallel.layout == "zigzag" else 1)
            expected = f"at least {units}, a token for each unit of {ranks} ranks (layout={self.parallel.layout!r})"
            require(self.segment_tokens >= units, "segment_tokens", self.segment_tokens, expected)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainConfig":
        """What `asdict` made `saved` of, perhaps by way of JSON; ValueError if it is none."""
        return from_dict(cls, saved)

    def _require_heads_for(self, ranks: int) -> None:
        """Raises ValueError unless heads of softmax attention can be spread over that many ranks as asked for."""
        if not self.model.attending:
            return
        heads, kv_heads = self.model.num_heads, self.model.kv_heads
        if self.parallel.softmax == "ulysses_ring" and ranks > 1:
            expected = f"a common factor with sequence_parallel={ranks} (ulysses_ring)"
            require(math.gcd(kv_heads, ranks) > 1, "num_kv_heads", kv_heads, expected)
        if self.parallel.softmax == "ulysses":
            expected = f"a multiple of sequence_parallel={ranks} (softmax='ulysses')"
            require(heads % ranks == 0, "num_heads", heads, expected)
            require(kv_heads % ranks == 0, "num_kv_heads", kv_heads, expected)

    def mesh_shape(self, world_size: int) -> tuple[int, int]:
        """(data_parallel, sequence_parallel) in a world of this size; ValueError if the run does not fit it."""
        data, sequence = self.parallel.mesh_shape(world_size)
        self._require_heads_for(sequence)
        self._require_units_for(sequence)
        for field, contexts in (("batch_contexts", self.batch_contexts), ("eval_contexts", self.data.eval_contexts)):
            if contexts is not None:
                require(contexts % data == 0, field, contexts, f"a multiple of data_parallel={data}")
        if self.parallel.fsdp and self.parallel.expert_parallel > 1:
            holders = world_size // self.parallel.expert_parallel
            for field, size in (
                ("hidden_size", self.model.hidden_size),
                ("expert_intermediate_size", self.model.expert_size),
            ):
                expected = f"a multiple of world size / expert_parallel = {holders} (fsdp shards each expert over them)"
                require(size % holders == 0, field, size, expected)
        return data, sequence
