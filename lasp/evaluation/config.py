"""What every evaluation is told: which model, where its results go, and the ranks that it runs on."""

from dataclasses import dataclass
from typing import Literal

import tyro

from lasp.config import ParallelConfig
from lasp.evaluation.results import Result
from lasp.evaluation.subject import Subject
from lasp.fields import FilePath, Seconds, check_fields
from lasp.names import LayoutName, SoftmaxName


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Contexts are split over all ranks that torchrun started."""

    model: tyro.conf.Positional[FilePath]  # a run's directory, one that `lasp export` wrote, or a Llama's
    output: FilePath | None = None  # directory of the results; MODEL/evaluation if None
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # the run's; of an export that of its weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs if every rank can have one
    layout: LayoutName = "zigzag"  # of a context over ranks
    softmax: SoftmaxName = "auto"  # how ranks share softmax layers
    timeout: Seconds = 600.0  # seconds after which a collective that a rank does not join ends the evaluation

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, subject: Subject) -> Result:
        """On all ranks together; the same on each. Raises ValueError for what cannot be evaluated."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        return self.output or f"{self.model}/evaluation"

    @property
    def allow_changed(self) -> tuple[str, ...]:
        return ()

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            sequence_parallel=None, layout=self.layout, softmax=self.softmax, fsdp=False, timeout=self.timeout
        )

    def mesh_shape(self, world_size: int) -> tuple[int, int]:
        return self.parallel.mesh_shape(world_size)
