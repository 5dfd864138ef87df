"""DeepSpeed's ZeRO (arXiv:1910.02054) as the engine of the training loop. Needs lasp's extra `deepspeed`.

The scale of the gradient. Every rank's loss is its part of one global sum, so gradients must be *summed* over all
ranks. DeepSpeed averages them instead, and by how much it divides depends on what it knows:

    it knows of no sequence parallelism    divides by the world size, in every stage
    it is given a sequence-parallel group  divides by world size / SP in stages 0 to 2 (engine.py and stage_1_and_2.py
                                           divide by dp_world_size / sequence_parallel_size), but by the world size in
                                           stage 3, where reduce_scatter_coalesced knows nothing of SP

So DeepSpeed is not told of sequence parallelism: to it all ranks are data-parallel ranks that happen to compute parts
of one sequence. ZeRO then shards over all of them, and the loss times the world size is right for every stage and every
DP x SP. Adam would hide a wrong factor (its update does not depend on the gradient's scale, unless it is clipped); the
tests use SGD.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.config import TrainConfig, require
from lasp.models.decoder import Block
from lasp.parallel.groups import wait_as_long_as_the_world
from lasp.training import checkpoint, integrity
from lasp.training.initial import Build
from lasp.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from lasp.training.ownership import Lock
from lasp.training.runtime import World
from lasp.training.storage import only_data
from lasp.training.zero_files import saved_classes


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The run's settings in DeepSpeed's words."""
    zero, clip_norm = config.deepspeed, config.optimizer.clip_norm
    data_parallel, _ = config.mesh_shape(world_size)
    sharding: dict[str, Any] = {"stage": zero.stage}
    if zero.offload:
        sharding["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.batch_contexts // data_parallel,
        # 0: no clipping (the default is 1). In stage 0 nothing would tell us the norm, so clipping is ours.
        "gradient_clipping": clip_norm if zero.stage > 0 and math.isfinite(clip_norm) else 0.0,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,  # PyTorch's AdamW: nothing to compile
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16"},
    }


class DeepSpeedEngine:
    """ZeRO over all ranks of the world; float32, or bfloat16 with float32 master weights."""

    model: Any  # DeepSpeed's engine, which is called as the decoder in it

    def __init__(self, config: TrainConfig, world: World, build: Build):
        deepspeed = _import(world.device)
        self.config, self.world, self.stage = config, world, config.deepspeed.stage
        self.halted = torch.zeros((), device=world.device)
        model = build(config, world.device)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if self.stage == 3:
            # Weights are gathered a block at a time, as with FSDP, and those that the decoder reads from its children
            # (the head's, the embedding's) with the decoder itself.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            config=deepspeed_config(config, world.size),
            dist_init_required=False,
        )
        wait_as_long_as_the_world(self.model.data_parallel_group)  # DeepSpeed's own copy of the world
        if self.stage == 3:
            for weight in {model.embedding.weight, *([] if model.head is None else [model.head.weight])}:
                deepspeed.zero.register_external_parameter(model, weight)
        for name, buffer in buffers.items():  # DeepSpeed has rounded those of a user's own modules with the weights
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, buffer)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.world.size, scale_wrt_gas=False)
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()  # counts the context, no more

    def step(self, lr: float, loss: Tensor) -> Tensor:
        if not math.isfinite(loss):
            return torch.full_like(loss, math.nan)
        set_learning_rate(self.optimizer, lr)
        if self.stage == 0:
            grad_norm = clip_gradients(self.model, self.config.optimizer.clip_norm)
            self.model.step()
            return grad_norm
        self.model.step()
        return torch.full_like(loss, float(self.model.get_global_grad_norm()))

    def go_on(self) -> None:
        """Every step but those that could not be taken is taken."""

    def save(self, step: int, lock: Lock, record: dict[str, Any]) -> None:
        def write(directory: Path) -> list[Path]:
            self.model.save_checkpoint(
                directory.parent, tag=directory.name, client_state={"step": step}, save_latest=False
            )
            return [*self._parts(directory), *(_whole_parts(directory) if self.world.rank == 0 else ())]

        integrity.require_finite(self._tensors(), dist.group.WORLD)
        checkpoint.commit(self.config.run_dir, step, self.config, write, lock, record, self.world.saves)

    def finish_saving(self) -> None:
        """A save is done when `save` returns."""

    def restore(self) -> int:
        path = checkpoint.find_resumable(self.config.run_dir, self.config, self._check, self.world.saves)
        if path is None:
            return 0
        with only_data(path, *saved_classes()):
            loaded, state = self.model.load_checkpoint(path.parent, tag=path.name)
        require(loaded is not None, f"checkpoint {path}", "nothing that DeepSpeed could load", "a complete one")
        return state["step"]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that is saved of this rank: weights, and the pieces of them in which ZeRO keeps optimiser states."""
        weights = self.model.module.named_parameters()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.stage == 3:
            states: dict[str, Any] = next(iter(optimizer.state.values()), {})
            keys = [key for key, state in states.items() if isinstance(state, Tensor) and state.ndim > 0]
            for name, weight in weights:
                yield from _own_share(name, weight, keys)
            return
        yield from weights
        yield from integrity.pieces(optimizer)

    def _check(self, path: Path) -> None:
        saved = checkpoint.read_config(path)["deepspeed"]["stage"]
        require(saved == self.stage, f"checkpoint {path}", f"ZeRO stage {saved}", f"deepspeed.stage {self.stage}")
        parts = len(list(path.glob("*_optim_states.pt")))
        fits = self.stage == 0 or parts == self.world.size
        require(fits, f"checkpoint {path}", f"one of {parts} ranks", f"one of {self.world.size}, as the world has")
        for file in (*self._parts(path), *_whole_parts(path)):  # before DeepSpeed's own messages, so that all refuse it
            with only_data(path, *saved_classes()):
                torch.load(file, map_location="cpu", mmap=True)

    def _parts(self, directory: Path) -> Iterable[Path]:
        """The files that this rank alone writes and reads."""
        return directory.glob(f"*pp_rank_{self.world.rank}_*")


def _own_share(name: str, weight: Any, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """This rank's share of a weight split by ZeRO stage 3, its fp32 copy and its optimiser's states of these keys.

    DeepSpeed pads the shares to one length with memory that nobody has written: what is padding is left out.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    share = weight.ds_tensor.numel()
    begin = dist.get_rank(weight.ds_process_group) * share
    held = min(max(weight.ds_numel - begin, 0), share)
    yield name, weight.ds_tensor[:held]
    if weight.requires_grad:
        yield f"fp32 {name}", safe_get_local_fp32_param(weight)[:held]
        for key in keys:
            yield f"{key} of {name}", safe_get_local_optimizer_state(weight, key)[:held]


def _whole_parts(directory: Path) -> Iterable[Path]:
    """The file that rank 0 writes and all ranks read; none in stage 3."""
    return directory.glob("mp_rank_*")


def _import(device: torch.device) -> Any:
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise ValueError(
            f"engine: got 'deepspeed', expected it to be installed (lasp's extra deepspeed): {error}"
        ) from error
    kind = get_accelerator().device_name()
    require(kind == device.type, "DS_ACCELERATOR", kind, f"{device.type}, where this run computes")
    return deepspeed
