"""A model that is evaluated, whole on every rank, and how a batch of contexts is given to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from lasp.config import ModelConfig
from lasp.data import Context
from lasp.evaluation.score import Scores, score
from lasp.models import Decoder
from lasp.names import LayoutName
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.runtime import World
from lasp.training.train import Batch, read_batches, share

Dtype = Literal["bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class Subject:
    """The model, in evaluation mode, and the ranks that it is evaluated on."""

    model: Decoder
    sp: SequenceParallel
    world: World

    @classmethod
    def of(cls, model: Decoder, world: World, layout: LayoutName, dtype: Dtype) -> "Subject":
        sp = SequenceParallel(world.mesh["sp"].get_group(), layout=layout, device=world.device)
        return cls(model.to(world.device, getattr(torch, dtype)).eval(), sp, world)

    def scores(self, contexts: Iterable[Context]) -> Iterator[tuple[Batch, Scores]]:
        """Those of this rank's labels, context after context of its data-parallel group. All ranks iterate together.

        Raises ValueError on every rank if one of them reads a token that is not in the vocabulary.
        """
        rest = iter(contexts)
        while group := list(islice(rest, self.world.mesh["dp"].size())):
            for batch in read_batches(share(group, self.world), self.sp, self.world):
                tokens, labels = batch.tokens.to(self.world.device), batch.labels.to(self.world.device)
                yield batch, score(self.model, tokens, labels, batch.seq)


def open_run(run_dir: str, world: World, *, layout: LayoutName = "contiguous", dtype: Dtype | None = None) -> Subject:
    """The last checkpoint of a run, in the run's dtype if no other is given.

    Raises ValueError for a directory without a checkpoint, or a damaged one.
    """
    path = checkpoint.require_latest(run_dir)
    config = checkpoint.read_config(path)
    model = Decoder(ModelConfig(**config["model"]))
    if "float64" in (dtype, config["dtype"]):
        model.double()
    checkpoint.load_model(path, model)
    return Subject.of(model, world, layout, dtype or config["dtype"])
