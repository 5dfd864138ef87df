"""Mixtures of experts without a loop over experts, for local layers: `moe_grouped_gemm=True`.

Megatron's own local experts are computed one after the other, which leaves a GPU waiting for the host. Here the router
is Megatron's, and with it balancing; what it has chosen is computed as in lasp's own models: rows put in the order of
their experts, one product for all of them, rows that travel to their experts' ranks and back.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from lasp.config import require
from lasp.kernels.experts import swiglu_experts
from lasp.models.moe import mix
from lasp.parallel.experts import ExpertParallel


class GroupedExperts(MegatronModule):
    """This rank's experts in two stacks of matrices, [E, 2 I, h] and [E, h, I].

    Checkpoints are those of Megatron's SequentialMLP.
    """

    def __init__(self, num_local_experts: int, config: Any, *, pg_collection: Any, **kwargs: Any):
        super().__init__(config=config)
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        self.run: Callable[..., Tensor] = swiglu_experts
        if self.ep_group.size() > 1:
            self.run = ExpertParallel(self.ep_group, swiglu_experts)
        hidden, intermediate = config.hidden_size, config.moe_ffn_hidden_size
        self.linear_fc1 = self._stack(num_local_experts, 2 * intermediate, hidden, config.init_method, dim=1)
        self.linear_fc2 = self._stack(num_local_experts, hidden, intermediate, config.output_layer_init_method, dim=2)

    def _stack(self, experts: int, rows: int, columns: int, init_method: Any, dim: int) -> nn.Parameter:
        """Initialised like Megatron's single matrices; from the default generator, all ranks' experts are drawn."""
        config, ranks = self.config, self.ep_group.size()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        stack = torch.empty(experts, rows, columns, dtype=config.params_dtype, device=device)
        if config.perform_initialization and config.use_cpu_initialization:
            drawn = torch.empty(rows, columns)
            for expert in range(ranks * experts):
                init_method(drawn)
                owner, place = divmod(expert, experts)
                if owner == self.ep_group.rank():
                    stack[place] = drawn
        elif config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for matrix in stack:
                    init_method(matrix)
        parameter: Any = nn.Parameter(stack)
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)  # no tensor-parallel rank has the same ones
        parameter.allreduce = ranks == 1  # else its gradient is summed over the ranks that hold these experts
        return parameter

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, h] in the order of all ranks' experts, counts [E of all ranks] int64 rows for each -> [N, h]."""
        return self.run(x, counts, self.linear_fc1.mT, self.linear_fc2.mT)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For `megatron.core.dist_checkpointing`; loads with any other expert-parallel size."""
        single = (metadata or {}).get("singleton_local_shards", False)
        require(not single, "singleton_local_shards", single, "False with moe_grouped_gemm")
        mine = len(sharded_offsets), self.ep_group.rank(), self.ep_group.size()
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{name}.weight",
                parameter,
                *sharded_offsets,
                mine,
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, parameter in self.named_parameters()
        }


class GroupedMoELayer(MoELayer):
    """MoELayer of `GroupedExperts`: [s, b, h] -> ([s, b, h], no bias)."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        require(intermediate_tensors is None, "cuda_graph_modules", "parts of a mixture", "none with moe_grouped_gemm")
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        run = partial(self._mix, mask=mask)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states), None
        return run(hidden_states), None

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        probabilities, routing_map = self.route(x, mask)
        chosen = routing_map.view(torch.uint8).topk(self.config.moe_router_topk, sorted=False).indices
        weights = probabilities.gather(-1, chosen)
        mixed = mix(x.flatten(0, 1), chosen, weights, self.experts, self.config.num_moe_experts).view_as(x)
        shared = self.shared_experts_compute(x)
        return mixed if shared is None else mixed + shared


def grouped(mlp: Any) -> Any:
    """The spec of a MoELayer, which is a partial of it in 0.19 and a ModuleSpec in 0.16, with grouped experts."""
    if isinstance(mlp, partial):
        submodules = replace(mlp.keywords["submodules"], experts=GroupedExperts)
        return partial(GroupedMoELayer, *mlp.args, **(mlp.keywords | {"submodules": submodules}))
    return replace(mlp, module=GroupedMoELayer, submodules=replace(mlp.submodules, experts=GroupedExperts))
