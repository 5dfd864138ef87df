"""What a training run on Megatron-Core is: its options, checked before any process group exists, and its model."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from lasp.config import Mixer, ModelConfig, Pattern, require
from lasp.fields import Allowed, Count, CountOrZero, FieldName, FilePath, NotNegative, Positive, Seconds, check_fields
from lasp.integrations.megatron.gpt import gpt_layer_specs
from lasp.integrations.megatron.loss import summing
from lasp.integrations.megatron.pattern import check_config, layer_letters
from lasp.integrations.megatron.presets import PRESETS
from lasp.integrations.megatron_weights import VOCABULARY_MULTIPLE, shape_of

Preset = Annotated[str, Allowed(f"one of {', '.join(PRESETS)}", PRESETS.__contains__)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `launch/megatron.sh`; data parallelism takes the ranks that the other sizes leave."""

    preset: Preset  # one of lasp.integrations.megatron.presets.PRESETS
    data: FilePath  # prefix of token files, as `lasp prepare` or Megatron write them
    run_dir: FilePath  # checkpoints, and Megatron's index of the data
    steps: Count
    sequence_length: Count
    global_batch: Count = 8  # sequences of a step
    micro_batch: Count = 1  # sequences of a forward pass
    tokenizer: FilePath = "byte"  # what the data was prepared with: "byte" or the path of a tokenizer.json
    model: Literal["gpt", "hybrid"] = "gpt"  # hybrid: megatron-core's HybridModel
    mixer: Mixer = "gated_delta_net"
    pattern: Pattern = "LLLN"  # L: linear attention, N: softmax; "L" is a pure model
    tensor_parallel: Count = 1  # with Megatron's sequence parallelism
    context_parallel: Count = 1
    pipeline_parallel: Count = 1
    expert_parallel: Count = 1
    distributed_optimizer: bool = False  # over data parallelism; wants Apex or TransformerEngine
    recompute: bool = False  # every layer in the backward pass
    lr: NotNegative = 3e-4
    warmup_steps: CountOrZero = 100
    weight_decay: NotNegative = 0.1
    clip_norm: NotNegative = 1.0  # 0: no clipping
    rope_theta: Positive = 500_000.0
    save_every: Count = 1000  # steps; the last one is always saved
    initial_weights: FilePath | None = None  # a checkpoint, or what `lasp export --to megatron` wrote, to begin from
    timeout: Seconds = 600.0  # seconds after which a collective that a rank does not join ends the run
    seed: CountOrZero = 0  # NumPy's and Megatron's own want 32 bits
    allow_changed: tuple[FieldName, ...] = ()  # fields whose values may differ from the checkpoint's: "seed", "data", …

    def __post_init__(self) -> None:
        check_fields(self)
        chunks = self.tensor_parallel * (2 * self.context_parallel if self.context_parallel > 1 else 1)
        expected = f"a multiple of {chunks}: tensor_parallel, times 2 · context_parallel if that is above 1"
        require(self.sequence_length % chunks == 0, "sequence_length", self.sequence_length, expected)
        expected = "None for model='hybrid', whose weights have other names"
        require(self.initial_weights is None or self.model == "gpt", "initial_weights", self.initial_weights, expected)
        layers = PRESETS[self.preset]()["num_layers"]
        layer_letters(self.pattern, layers)
        stages = self.pipeline_parallel
        require(layers % stages == 0, "pipeline_parallel", stages, f"a divisor of the {layers} layers")

    def data_parallel(self, ranks: int) -> int:
        """What is left of that many ranks; ValueError if the run does not fit them."""
        model = self.tensor_parallel * self.context_parallel * self.pipeline_parallel
        require(ranks % model == 0, "ranks", ranks, f"a multiple of tensor x context x pipeline parallel = {model}")
        copies = ranks // model
        share = copies * self.micro_batch
        require(self.global_batch % share == 0, "global_batch", self.global_batch, f"a multiple of {share}")
        if self.expert_parallel > 1:
            shared = ranks // self.pipeline_parallel
            expected = f"a divisor of the {shared} ranks of a pipeline stage"
            require(shared % self.expert_parallel == 0, "expert_parallel", self.expert_parallel, expected)
        return copies

    @property
    def expert_tensor_parallel(self) -> int:
        """Experts are spread, or else split like every other matrix."""
        return 1 if self.expert_parallel > 1 else self.tensor_parallel

    def transformer_config(self, cpu: bool) -> TransformerConfig:
        """On GPUs in bf16, on CPUs in fp32."""
        shape = PRESETS[self.preset]()
        if self.model == "hybrid":
            shape["num_layers"] *= 2  # a mixer and an MLP each
        options: dict[str, Any] = {
            "tensor_model_parallel_size": self.tensor_parallel,
            "context_parallel_size": self.context_parallel,
            "pipeline_model_parallel_size": self.pipeline_parallel,
            "expert_model_parallel_size": self.expert_parallel,
            "expert_tensor_parallel_size": self.expert_tensor_parallel,
            "sequence_parallel": self.tensor_parallel > 1,
            "moe_grouped_gemm": self.expert_tensor_parallel == 1,
            "bias_activation_fusion": not cpu,
            "calculate_per_token_loss": True,
            "use_cpu_initialization": cpu,
            "bf16": not cpu,
            "params_dtype": torch.float32 if cpu else torch.bfloat16,
            "pipeline_dtype": torch.float32 if cpu else torch.bfloat16,
        }
        if self.recompute:
            options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        config = TransformerConfig(**shape, **options)
        check_config(config, self.mixer)
        return config

    def shape(self, config: TransformerConfig, vocab_size: int) -> ModelConfig:
        """The same model as lasp's own configuration; of model="gpt"."""
        return shape_of(
            config, pattern=self.pattern, mixer=self.mixer, vocab_size=vocab_size, rope_theta=self.rope_theta
        )

    def build(self, config: TransformerConfig, vocab_size: int) -> Any:
        """This pipeline stage's part of the model (see `lasp.integrations.megatron.loss`).

        The vocabulary is padded to a multiple of 128, whatever the mesh.
        """
        padded = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        require(padded % self.tensor_parallel == 0, "tensor_parallel", self.tensor_parallel, f"a divisor of {padded}")
        common: dict[str, Any] = {
            "vocab_size": padded,
            "max_sequence_length": self.sequence_length,
            "pre_process": parallel_state.is_pipeline_first_stage(),
            "post_process": parallel_state.is_pipeline_last_stage(),
            "position_embedding_type": "rope",
            "rotary_base": self.rope_theta,
        }
        options: dict[str, Any] = {"mixer": self.mixer, "rope_theta": self.rope_theta}
        if self.model == "gpt":
            return summing(GPTModel)(config, gpt_layer_specs(config, self.pattern, **options), **common)
        from megatron.core.models.hybrid.hybrid_model import HybridModel  # not in 0.16

        from lasp.integrations.megatron.hybrid import hybrid_pattern, hybrid_stack_spec

        pattern = hybrid_pattern(config, self.pattern)
        spec = hybrid_stack_spec(config, pattern, **options)
        return summing(HybridModel)(config, spec, hybrid_layer_pattern=pattern, **common)
