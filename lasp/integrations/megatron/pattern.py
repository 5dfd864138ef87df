"""Which layer is what: pattern strings as in lasp's own models, checked against Megatron's configuration."""

from typing import Any

import megatron.core
import torch.nn.functional as F

from lasp.config import LINEAR, MIXERS, SOFTMAX, require
from lasp.integrations.megatron_weights import require_values

SUPPORTED = ((0, 16, 1), (0, 20))  # from the first, below the second


def check_version() -> None:
    """Raises ValueError unless the installed megatron-core is one that lasp knows."""
    version = megatron.core.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    require(SUPPORTED[0] <= numbers < SUPPORTED[1], "megatron-core", version, f"at least {low} and below {high}")


def layer_letters(pattern: str, num_layers: int) -> str:
    """One letter per layer: L (linear attention) or N (softmax), the pattern repeated."""
    require(bool(pattern) and set(pattern) <= {LINEAR, SOFTMAX}, "pattern", pattern, f"letters {LINEAR} and {SOFTMAX}")
    expected = f"a multiple of the length of the pattern {pattern!r}"
    require(num_layers % len(pattern) == 0, "num_layers", num_layers, expected)
    return pattern * (num_layers // len(pattern))


def check_config(config: Any, mixer: str) -> None:
    """Raises ValueError for what the layers of a pattern cannot be built or trained with.

    Heads and groups that tensor parallelism cannot share TransformerConfig itself refuses.
    """
    check_version()
    require(mixer in MIXERS, "mixer", mixer, f"one of {', '.join(MIXERS)}")
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    latent = config.multi_latent_attention
    require(not latent, "multi_latent_attention", latent, "False")
    if config.num_moe_experts is not None:
        ep = config.expert_model_parallel_size
        experts = config.num_moe_experts
        require(experts % ep == 0, "num_moe_experts", experts, f"a multiple of expert_model_parallel_size={ep}")
        etp = config.expert_tensor_parallel_size
        # Megatron marks experts for their own gradient reduction only if ep > 1.
        expected = f"tensor_model_parallel_size={tp} where expert_model_parallel_size is 1"
        require(ep > 1 or etp == tp, "expert_tensor_parallel_size", etp, expected)
        together = config.sequence_parallel or tp == 1
        require(together, "sequence_parallel", config.sequence_parallel, "True for MoE with tensor parallelism")
        if config.moe_grouped_gemm:
            _check_grouped_experts(config)
    uneven = (
        config.pipeline_model_parallel_layout,
        config.num_layers_in_first_pipeline_stage,
        config.num_layers_in_last_pipeline_stage,
    )
    plain = not (config.account_for_embedding_in_pipeline_split or config.account_for_loss_in_pipeline_split)
    if plain and all(setting is None for setting in uneven):
        chunks = pp * (config.virtual_pipeline_model_parallel_size or 1)
        expected = f"a multiple of the {chunks} pipeline stages (virtual ones included)"
        require(config.num_layers % chunks == 0, "num_layers", config.num_layers, expected)


def _check_grouped_experts(config: Any) -> None:
    """Raises ValueError for what `lasp.integrations.megatron.experts` does not compute."""
    swiglu = config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
    require(swiglu, "moe_grouped_gemm", True, "False unless experts are SwiGLU MLPs without biases")
    wanted: dict[str, Any] = {
        "expert_tensor_parallel_size": 1,
        "activation_func_clamp_value": None,
        "moe_mlp_glu_interleave_size": None,
        "moe_expert_capacity_factor": None,
        "moe_shared_expert_overlap": False,
        "moe_apply_probs_on_input": False,
        "moe_latent_size": None,
        "fp8": None,
        "fp4": None,
    }
    require_values(config, wanted, " with moe_grouped_gemm")  # versions differ in the last few
