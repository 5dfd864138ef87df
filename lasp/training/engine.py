"""Who holds the weights and updates them: PyTorch itself (lasp.training.native), or DeepSpeed."""

from typing import Any, Protocol

from torch import Tensor

from lasp.config import TrainConfig
from lasp.models import Decoder
from lasp.training.deepspeed import DeepSpeedEngine
from lasp.training.initial import Build, build_model
from lasp.training.native import NativeEngine
from lasp.training.ownership import Lock
from lasp.training.planning import settled
from lasp.training.runtime import World


class Engine(Protocol):
    """What the loop needs. Calls are made by all ranks together, in the same order."""

    model: Decoder
    """Or what is called as it is."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's loss; the parts of all contexts and all ranks sum up to the loss.

        Called once for each of the batch_contexts / data_parallel contexts of this rank's group, or for
        contexts_at_once of them.
        """
        ...

    halted: Tensor
    """1.0 from a step on that could not be taken, else 0.0: a scalar on the device."""

    def step(self, lr: float, loss: Tensor) -> Tensor:
        """Clips the summed gradients, updates the weights, and begins anew; returns the gradient norm before clipping.

        Where that or the loss is not finite, on any rank, what is returned is so on all: the step cannot be taken, and
        neither it nor those that follow change a weight, until `go_on` is called. With DeepSpeed the next one does.
        """
        ...

    def go_on(self) -> None:
        """Leaves out the steps that could not be taken."""
        ...

    def save(self, step: int, lock: Lock, record: dict[str, Any]) -> None:
        """Saves a checkpoint of the run, which holds the lock, after that many steps; a record beside its settings.

        With config.checkpoint_async it may be under way still when this returns. Raises FloatingPointError on every
        rank, and saves nothing, if a weight or a state is not finite.
        """
        ...

    def finish_saving(self) -> None:
        """Returns when the last save is done; raises what it raised."""
        ...

    def restore(self) -> int:
        """Goes back to the run's last checkpoint, if there is one; returns how many steps had been taken (0: none)."""
        ...


def make_engine(config: TrainConfig, world: World, build: Build = build_model) -> Engine:
    """The engine that config.engine names, with a model of fresh weights, the same on every rank.

    Raises ValueError for a configuration that the engine cannot run, or if it is not installed.
    """
    config = settled(config, world)
    return (DeepSpeedEngine if config.engine == "deepspeed" else NativeEngine)(config, world, build)
