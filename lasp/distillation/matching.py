"""First stage: every linear mixer learns to give what the softmax layer in its place gives, of the same input.

The input is the teacher's, in every layer: what a layer hands on is the teacher's output. So layers learn independently
of each other, all of them in one pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lasp.config import LINEAR, ModelConfig
from lasp.models import Decoder, SequenceOps
from lasp.models.decoder import Block
from lasp.models.layers import at_least_float32
from lasp.models.loss import IGNORE


class MatchedBlock(Block):
    """In training mode the teacher's block, with the squared distance of the own mixer's output from its mixer's,
    [B, T]."""

    teacher: nn.Module | None = None

    def forward(self, x: Tensor, seq: SequenceOps, for_past: bool = False) -> tuple[Tensor, Any]:
        if not self.training or self.teacher is None:
            return super().forward(x, seq, for_past)
        normed = self.mixer_norm(x)
        with torch.no_grad():
            wanted = self.teacher(normed, seq)
        distance = at_least_float32(self.mixer(normed, seq) - wanted).square().sum(-1)
        x = x + wanted
        return x + self.mlp(self.mlp_norm(x)), distance


class Matching(Decoder):
    """A decoder with the teacher's weights but in linear mixers, which alone are trained: its loss in training mode is
    the sum over these layers of the distances at tokens with a label."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(MatchedBlock(config, layer) for layer in range(config.num_layers))
        self.init_weights()

    def follow(self, teacher: Decoder) -> None:
        """teacher: on this device, in the dtype of the compute. It is no part of the state."""
        self.requires_grad_(False)
        own: Any
        its: Any
        for letter, own, its in zip(self.config.layers, self.layers, teacher.layers, strict=True):
            if letter == LINEAR:
                own.mixer.requires_grad_(True)
                object.__setattr__(own, "teacher", its.mixer)

    def forward(self, tokens: Tensor, seq: Any, *, labels: Any = None, scored: Any = None, memory: Any = None) -> Any:
        if labels is None or not self.training:
            return super().forward(tokens, seq, labels=labels, scored=scored, memory=memory)
        _, found = self._run(tokens, seq, labels, memory)
        distances: list[Any] = list(found)  # in the place of routings
        labelled = (labels != IGNORE) & seq.valid.to(labels.device)
        return torch.stack(distances).where(labelled, 0).sum(), labelled.sum()
