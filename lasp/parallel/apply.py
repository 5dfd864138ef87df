"""Placing a model on a mesh of data- and sequence-parallel ranks: the only place where models and parallelism meet.

Every rank of the mesh computes its part of the gradient of one global mean, so gradients are summed over the whole
mesh, along whichever of its axes. A model needs no more of sequence parallelism than the `Sequence` passed to it.

Expert parallelism divides the same ranks once more: neighbours share the experts of a mixture between them, and the
gradient of an expert is summed over the ranks that hold it.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from lasp.kernels import checks
from lasp.models.moe import Experts
from lasp.parallel import comm
from lasp.parallel.agreement import agree, agree_on_cpus, signature
from lasp.parallel.experts import ExpertParallel
from lasp.parallel.groups import flatten, make_mesh

Model = TypeVar("Model", bound=nn.Module)
_HOLDERS, _EXPERTS = "expert_holders", "experts"  # axes of the mesh on which experts are placed


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    *,
    fsdp: bool = False,
    compute_dtype: torch.dtype | None = None,
    expert_parallel: int = 1,
) -> Model:
    """Makes `model` the same on all ranks of `mesh`, or shards it over them; call `reduce_gradients` after backward.

    Args:
        model: a decoder whose blocks are in `model.layers`, materialised on this rank's device. With fsdp or expert
            parallelism it is changed in place.
        mesh: any axes; all of them together hold one model.
        fsdp: shard parameters, gradients and optimiser state over the mesh (FSDP2, block by block). Ranks must hold
            equal parameters already; without fsdp, rank 0's are broadcast.
        compute_dtype: with fsdp, the dtype in which parameters are gathered and used; gradients are summed in fp32.
        expert_parallel: over how many neighbouring ranks each mixture's experts are spread. With fsdp each expert is
            sharded over the ranks that then hold it, along its rows.

    Returns:
        model.

    Raises:
        ValueError: compute_dtype without fsdp; experts or ranks that expert_parallel does not divide; experts whose
            rows the ranks that hold them do not.
    """
    everyone = flatten(mesh)
    group = everyone.get_group()
    mixtures = [module for module in model.modules() if isinstance(module, Experts)] if expert_parallel > 1 else []

    def check() -> object:
        checks.require(fsdp or compute_dtype is None, "compute_dtype", f"{compute_dtype} without fsdp", "None")
        if expert_parallel > 1:
            _check_experts(mixtures, everyone.size(), expert_parallel, fsdp)
        options = {"fsdp": fsdp, "compute_dtype": compute_dtype, "expert_parallel": expert_parallel}
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        return options | {name: (x.dtype, list(x.shape), x.requires_grad) for name, x in tensors.items()}

    agree(group, check, call="parallelize")
    if not fsdp:
        for tensor in (*model.parameters(), *model.buffers()):
            comm.broadcast(tensor.detach(), group)
    if mixtures:
        ranks = everyone.mesh.view(-1, expert_parallel)
        placed = make_mesh(mesh.device_type, ranks, (_HOLDERS, _EXPERTS))
        flatten(placed)  # DTensor then takes norms over both axes in one all-reduce
        for experts in mixtures:
            _spread(experts, placed, fsdp)
    if fsdp:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
        for experts in mixtures:
            # By rows, and not by experts, of which few may be left on each rank.
            by_rows = fully_shard(
                experts, mesh=placed[_HOLDERS], shard_placement_fn=lambda _: Shard(1), mp_policy=policy
            )
            _add_up(by_rows)
        blocks: list[nn.Module] = [*model.get_submodule("layers").children(), model]
        for block in blocks:
            _add_up(fully_shard(block, mesh=everyone, mp_policy=policy))
        for method in ("remember", "begin", "finish"):  # that a model may be called by besides its forward
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model


def keep_gathered(model: nn.Module, keep: bool) -> None:
    """From now on blocks that FSDP shards leave their weights, and the sums of their gradients, gathered or not.

    That spares messages, or copies, of all of them for each forward and backward. Other models stay as they are.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)
        model.set_reshard_after_backward(not keep)
        for block in model.modules():
            if isinstance(block, FSDPModule) and block is not model:  # which stays gathered from forward to backward
                block.set_reshard_after_forward(not keep, recurse=False)


def others_parameters(model: nn.Module) -> int:
    """How many parameters come to this rank from others when all that FSDP shards is gathered."""
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    # Experts stay spread over the second axis of their mesh.
    return sum(parameter.to_local().numel() * (parameter.device_mesh.size(0) - 1) for parameter in sharded)


def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sums the gradients over all ranks of `mesh` (of experts, over those that hold them), in place.

    FSDP has done so already. A parameter that took no part on this rank counts as zero.
    """
    if isinstance(model, FSDPModule):
        return
    everyone = flatten(mesh).get_group()
    together: dict[tuple[dist.ProcessGroup, torch.dtype], list[Tensor]] = {}
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            group, grad = everyone, parameter.grad
            if isinstance(grad, DTensor):
                group, grad = grad.device_mesh[_HOLDERS].get_group(), grad.to_local()
            together.setdefault((group, grad.dtype), []).append(grad)
            named[name] = grad
    agree_on_cpus(everyone, lambda: signature(**named), call="reduce_gradients")
    if comm.size(everyone) == 1:
        return
    for (group, _), grads in together.items():
        total = comm.all_reduce(torch.cat([grad.flatten() for grad in grads]), group).wait()
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _check_experts(mixtures: list[Experts], ranks: int, parts: int, fsdp: bool) -> None:
    checks.require(bool(mixtures), "expert_parallel", parts, "1 for a model without experts")
    checks.require(ranks % parts == 0, "expert_parallel", parts, f"a divisor of the mesh's {ranks} ranks")
    for stack in (stack for experts in mixtures for stack in experts.parameters()):
        count, rows, _ = stack.shape
        checks.require(count % parts == 0, "num_experts", count, f"a multiple of expert_parallel={parts}")
        holders = ranks // parts
        checks.require(not fsdp or rows % holders == 0, "experts", f"{rows} rows", f"a multiple of {holders} (fsdp)")


def _spread(experts: Experts, mesh: DeviceMesh, fsdp: bool) -> None:
    """Leaves this rank its part of the experts, as DTensors that know what the whole is."""
    part = mesh[_EXPERTS]
    for name, stack in list(experts.named_parameters()):
        own = stack.detach().chunk(part.size())[part.get_local_rank()].clone()
        # FSDP shards over the other axis by itself.
        placed = (part, [Shard(0)]) if fsdp else (mesh, [Replicate(), Shard(0)])
        setattr(experts, name, nn.Parameter(DTensor.from_local(own, *placed, run_check=False)))
    experts.run = ExpertParallel(part.get_group(), experts.run)


def _add_up(sharded: FSDPModule) -> None:
    sharded.set_gradient_divide_factor(1.0)  # each rank's gradient is its part of a sum …
    sharded.set_force_sum_reduction_for_comms(True)  # … which gloo, too, can take
