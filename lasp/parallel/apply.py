"""Placing a model on a mesh of data- and sequence-parallel ranks: the only place where models and parallelism meet.

Every rank of the mesh computes its part of the gradient of one global mean, so gradients are summed over the whole
mesh, along whichever of its axes. A model needs no more of sequence parallelism than the `Sequence` passed to it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lasp.parallel import comm


def parallelize(
    model: nn.Module, mesh: DeviceMesh, *, fsdp: bool = False, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """Makes `model` the same on all ranks of `mesh`, or shards it over them; call `reduce_gradients` after backward.

    Args:
        model: a decoder whose blocks are in `model.layers`, materialised on this rank's device. With fsdp it is changed
            in place.
        mesh: any axes; all of them together hold one model.
        fsdp: shard parameters, gradients and optimiser state over the mesh (FSDP2, block by block). Ranks must hold
            equal parameters already; without fsdp, rank 0's are broadcast.
        compute_dtype: with fsdp, the dtype in which parameters are gathered and used; gradients are summed in fp32.

    Returns:
        model.

    Raises:
        ValueError: compute_dtype without fsdp.
    """
    if fsdp:
        everyone = _flat(mesh)
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
        for block in [*model.get_submodule("layers").children(), model]:
            sharded = fully_shard(block, mesh=everyone, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)  # each rank's gradient is its part of a sum …
            sharded.set_force_sum_reduction_for_comms(True)  # … which gloo, too, can take
        return model
    if compute_dtype is not None:
        raise ValueError(f"compute_dtype: got {compute_dtype} without fsdp, expected None")
    group = _flat(mesh).get_group()
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    return model


def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sums the gradients over all ranks of `mesh`, in place; FSDP has done so already.

    A parameter that took no part on this rank counts as zero.
    """
    if isinstance(model, FSDPModule):
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    group = _flat(mesh).get_group()
    for grads in by_dtype.values():
        total = comm.all_reduce(torch.cat([grad.flatten() for grad in grads]), group).wait()
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of the mesh along one axis; made once per mesh."""
    if mesh.ndim == 1:
        return mesh
    return mesh._flatten("_".join(mesh.mesh_dim_names or ()))
