"""What steps gave, told in the metrics. Their numbers stay on the device until those of several steps are read at once:
the host waits for a GPU then, and not in between."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.config import TrainConfig
from lasp.data import Numbered
from lasp.models import flops_per_token
from lasp.parallel import comm
from lasp.parallel.waits import waits
from lasp.training.engine import Engine
from lasp.training.metrics import Metrics, model_flop_utilisation, peak_flops
from lasp.training.numerics import Spikes, name_contexts
from lasp.training.runtime import World
from lasp.training.usage import GIB, peak_memory

PERIOD = 1.0  # seconds after which steps are read though they are few: waiting is nothing beside slow steps


@dataclass(frozen=True)
class Step:
    """One that was begun. number: how many there are with it. tokens: those of all of them. values: scalars on the
    device, `loss` and `grad_norm` and what else there is to log."""

    number: int
    lr: float
    context_length: int
    contexts: list[Numbered]
    tokens: int
    values: dict[str, Tensor]


class Reader:
    """Steps in the order in which they were begun.

    tell: what is not finite in a step that could not be taken, of its loss, gradient norm and contexts. Such a step is
    left out, or ends the run as soon as it is read; so where it may be left out, or the engine does not halt, steps are
    read one by one.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        engine: Engine,
        metrics: Metrics,
        tell: Callable[[float, float, list[Numbered]], str],
    ):
        self.config, self.world, self.engine, self.metrics, self.tell = config, world, engine, metrics, tell
        self.most = 1 if config.skip_nonfinite or config.engine == "deepspeed" else config.log_every
        self.peak = None if config.model.is_own else peak_flops(world.device, config.dtype)
        self.spikes, self.skipped, self.loss = Spikes(), 0, math.nan
        self._steps: list[Step] = []
        self.restart()

    def restart(self) -> None:
        """Begins to measure time anew."""
        self._since = time.perf_counter()

    def add(self, step: Step) -> None:
        self._steps.append(step)

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._steps) >= self.most or time.perf_counter() - self._since >= PERIOD

    def read(self) -> None:
        """Logs all steps since the last call. Collective.

        Raises FloatingPointError on every rank for a step that could not be taken, unless it may be left out.
        """
        slow = who_is_slow(self.world)
        for step, values, seconds in self._read():
            told = {"lr": step.lr} | self._taken_or_left_out(step, values) | (slow if step is self._last else {})
            tokens_per_second = self.config.batch_contexts * self.config.context_length / seconds
            told |= {"memory": peak_memory(self.world.device) / GIB, "tokens_per_second": tokens_per_second}
            if self.peak is not None:
                flops = flops_per_token(self.config.model, step.context_length)
                told["mfu"] = model_flop_utilisation(flops, tokens_per_second, self.world.size, self.peak)
            if self.config.curriculum:
                told["context_length"] = step.context_length
            self.metrics.log(step.number, **told, tokens=step.tokens)

    def _read(self) -> Iterator[tuple[Step, dict[str, float], float]]:
        """Each step, its numbers, and the seconds that one took on average."""
        steps, self._steps = self._steps, []
        self._last = steps[-1]
        numbers = iter(torch.stack([x.double() for step in steps for x in step.values.values()]).tolist())
        seconds = (time.perf_counter() - self._since) / len(steps)
        self.restart()
        for step in steps:
            yield step, {name: next(numbers) for name in step.values}, seconds

    def _taken_or_left_out(self, step: Step, values: dict[str, float]) -> dict[str, float]:
        """What there is to log of it."""
        loss, grad_norm, contexts = values["loss"], values["grad_norm"], step.contexts
        if math.isfinite(grad_norm):
            self.skipped, self.loss = 0, loss
            if (median := self.spikes.median_if_spike(loss)) is not None:
                numbers = [each.number if each.corpus is None else [each.corpus, each.number] for each in contexts]
                self.metrics.note(step.number, spike=loss, median=median, contexts=numbers)
                self.metrics.say(
                    f"step {step.number}, {name_contexts(contexts)}: loss {loss:.4f}, the median {median:.4f}"
                )
            return values
        story = self.tell(loss, grad_norm, contexts)
        if self.skipped == self.config.skip_nonfinite:
            raise FloatingPointError(f"step {step.number}, {story}")
        self.skipped += 1
        self.metrics.say(f"step {step.number} left out, {self.skipped} in a row: {story}")
        self.engine.go_on()
        return {"skipped": self.skipped}


def who_is_slow(world: World) -> dict[str, float]:
    """The rank that has waited least for the others' messages since the last call, and how much longer most waited."""
    if world.size == 1:
        return {}
    mine = torch.tensor(waits.take(), dtype=torch.float64, device=world.device)
    waited = comm.replicate(mine, dist.group.WORLD, "comparison of waits").cpu()
    return {"slowest_rank": waited.argmin().item(), "waited_for_it": (waited.median() - waited.min()).item()}
