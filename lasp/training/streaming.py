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
from lasp.data import Context, labelled_places, local_batch
from lasp.kernels.parked import to_device
from lasp.models.carried import Carried, Gradients, SegmentPast
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

    def on(self, device: torch.device) -> "Part":
        return Part(*(to_device(x, device) for x in self))

    def scored(self, device: torch.device) -> Tensor | None:
        """`labelled_places`, on that device, if the labels are on the host, which would have to wait for others."""
        places = None if self.labels.is_cuda else labelled_places(self.labels)
        return None if places is None else to_device(places, device)


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
        carried, gradients = Carried(self.on_host), Gradients()
        self._go_forward(model, carried)
        total = torch.zeros((), dtype=torch.float64, device=_device(model))
        for number, past in zip(reversed(range(len(self.stream))), carried.backward(), strict=True):
            total += self._go_back(model, number, past, gradients, labels)
            gradients = past.gradients()
        return total

    def _go_forward(self, model: Any, carried: Carried) -> None:
        """To the entry of the last segment, or through it where balancing losses need sums over the whole stream."""
        whole = model.training and model.config.num_experts > 0
        for segment, part in zip(self.stream, self.parts, strict=True):
            last = segment.number == len(self.stream) - 1
            if not last or whole:
                past = carried.forward()
                tokens, labels = part.on(_device(model))
                model.remember(tokens, segment, past, labels=labels)
                if not last:
                    carried.keep(past)

    def _go_back(self, model: Any, number: int, past: SegmentPast, gradients: Gradients, labels: float) -> Tensor:
        """Through one segment; gradients are those of what it hands on."""
        device = _device(model)
        tokens, targets = self.parts[number].on(device)
        scored = self.parts[number].scored(device)
        loss_sum, _ = model(tokens, self.stream[number], labels=targets, scored=scored, memory=past)
        handed_on, of_handed_on = past.handed_on(gradients)
        torch.autograd.backward([loss_sum / labels, *handed_on], [None, *of_handed_on])
        return loss_sum.detach()

    @torch.no_grad()
    def loss(self, model: Any) -> tuple[Tensor, Tensor]:
        """This rank's sum of losses and number of labels, in a model that is not in training mode."""
        carried, sums = Carried(self.on_host), torch.zeros(2, dtype=torch.float64, device=_device(model))
        for segment, part in zip(self.stream, self.parts, strict=True):
            carried.forget_before(segment.first)
            past = carried.forward()
            device = _device(model)
            (tokens, targets), scored = part.on(device), part.scored(device)
            losses = model(tokens, segment, labels=targets, scored=scored, memory=past)
            sums += torch.stack([x.double() for x in losses])
            carried.keep(past)
        return sums[0], sums[1]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
