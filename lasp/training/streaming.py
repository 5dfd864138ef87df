"""Training on contexts longer than memory: a context as a stream of segments, with exact gradients (math §7).

    forward     segment by segment, without a graph; kept is what each segment is entered with
    backward    from the last segment to the first: each is computed again, with a graph

Only one segment's activations are alive at a time. A step costs one more forward pass, but without the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.config import TrainConfig
from lasp.data import Context, local_batch
from lasp.models.carried import Carried, Gradients
from lasp.parallel import Stream


class Segments(NamedTuple):
    """What makes streams of contexts. tokens: of a segment. on_host: what they hand on waits in the host's memory."""

    tokens: int
    on_host: bool

    @classmethod
    def of(cls, config: TrainConfig) -> "Segments | None":
        return None if config.segment_tokens is None else cls(config.segment_tokens, config.segment_offload)


class Part(NamedTuple):
    """A segment's tokens and labels on this rank, int64 [B, T_local] on any device."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StreamedBatch:
    """One batch of a stream, segment by segment.

    on_host: what segments hand on to each other waits in the host's memory.
    """

    stream: Stream
    parts: Sequence[Part]
    on_host: bool = False

    @classmethod
    def of(cls, stream: Stream, tokens: Tensor, labels: Tensor, on_host: bool = False) -> "StreamedBatch":
        """Of whole tokens and labels, [B, tokens] int64, the labels shifted."""
        return cls(
            stream, [Part(*part) for part in zip(stream.shard(tokens), stream.shard(labels), strict=True)], on_host
        )

    @classmethod
    def read(cls, context: Context, stream: Stream, on_host: bool = False) -> "StreamedBatch":
        """Of a context, of which this rank reads its own units alone."""
        return cls(stream, [Part(*local_batch(context, ranges)) for ranges in stream.local_ranges], on_host)

    def backward(self, model: Any, labels: float) -> Tensor:
        """Adds the gradient of this rank's sum of losses / labels to that of the model's parameters; returns the sum.

        model: a decoder, or what is called as one. The losses are those of its `forward`: in training mode with this
        rank's part of the balancing losses, which are those of the whole stream.
        """
        carried, stream = Carried(self.on_host), self.stream
        has_sums = model.training and model.config.num_experts > 0  # to which the last segment contributes
        for segment, part in zip(stream, self.parts, strict=True):
            last = segment.number == len(stream) - 1
            if not last or has_sums:
                past = carried.forward()
                tokens, targets = self._on_device(part)
                model.remember(tokens, segment, past, labels=targets)
                if not last:
                    carried.keep(past)
        total, gradients = torch.zeros((), dtype=torch.float64, device=stream.parallel.device), Gradients()
        for number, past in zip(reversed(range(len(stream))), carried.backward(), strict=True):
            tokens, targets = self._on_device(self.parts[number])
            loss_sum, _ = model(tokens, stream[number], labels=targets, memory=past)
            handed_on, gradients_of_it = past.handed_on(gradients)
            torch.autograd.backward([loss_sum / labels, *handed_on], [None, *gradients_of_it])
            total += loss_sum.detach()
            gradients = past.gradients()
        return total

    @torch.no_grad()
    def loss(self, model: Any) -> tuple[Tensor, Tensor]:
        """This rank's sum of losses and number of labels, in a model that is not in training mode."""
        carried, sums = Carried(self.on_host), torch.zeros(2, dtype=torch.float64, device=self.stream.parallel.device)
        for segment, part in zip(self.stream, self.parts, strict=True):
            carried.forget_before(segment.first)
            past = carried.forward()
            tokens, targets = self._on_device(part)
            sums += torch.stack([x.double() for x in model(tokens, segment, labels=targets, memory=past)])
            carried.keep(past)
        return sums[0], sums[1]

    def _on_device(self, part: Part) -> Part:
        device = self.stream.parallel.device
        return Part(*(x.to(device) for x in part))
