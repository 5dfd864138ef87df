"""Training on contexts longer than memory: a context as a stream of segments, with exact gradients (math §7).

    forward     segment by segment, without a graph; kept is what each segment is entered with
    backward    from the last segment to the first: each is computed again, with a graph

Only one segment's activations are alive at a time. A step costs one more forward pass, but without the head, for all
but the last segment, which has its graph from the first one. So may some before it, where there is memory for what
their layers keep until backward (`lasp.models.recompute`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.config import TrainConfig
from lasp.data import Context, labelled_places, local_batch
from lasp.kernels.parked import to_device
from lasp.models.carried import Carried, Gradients
from lasp.models.decoder import Hidden
from lasp.parallel import Stream
from lasp.parallel.apply import keep_gathered


class Segments(NamedTuple):
    """What makes streams of contexts. tokens: of a segment. on_host: what they hand on waits in the host's memory.
    graphs: so many segments at the end are computed once."""

    tokens: int
    on_host: bool
    graphs: int = 1

    @classmethod
    def of(cls, config: TrainConfig) -> "Segments | None":
        if config.segment_tokens is None:
            return None
        return cls(config.segment_tokens, config.segment_offload, config.segment_graphs or 1)


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

    on_host: what segments hand on to each other waits in the host's memory. graphs: so many segments at the end, one at
    least, are computed once.
    """

    stream: Stream
    parts: Sequence[Part]
    on_host: bool = False
    graphs: int = 1

    @classmethod
    def of(cls, stream: Stream, tokens: Tensor, labels: Tensor, **how: Any) -> "StreamedBatch":
        """Of whole tokens and labels, [B, tokens] int64, the labels shifted."""
        parts = zip(stream.shard(tokens), stream.shard(labels), strict=True)
        return cls(stream, [Part(*part) for part in parts], **how)

    @classmethod
    def read(cls, context: Context, stream: Stream, **how: Any) -> "StreamedBatch":
        """Of a context, of which this rank reads its own units alone."""
        return cls(stream, [Part(*local_batch(context, ranges)) for ranges in stream.local_ranges], **how)

    def backward(self, model: Any, labels: float) -> Tensor:
        """Adds the gradient of this rank's sum of losses / labels to that of the model's parameters; returns the sum.

        model: a decoder, or what is called as one. The losses are those of its `forward`: in training mode with this
        rank's part of the balancing losses, which are those of the whole stream.
        """
        carried, gradients, device = Carried(self.on_host), Gradients(), _device(model)
        keep_gathered(model, len(self.stream) > 1)
        begun = self._go_forward(model, carried)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, past in zip(reversed(range(len(self.stream))), carried.backward(), strict=True):
            if number == 0:  # the last one to go back through
                keep_gathered(model, False)
            segment, part = self.stream[number], self.parts[number]
            (tokens, targets), scored = part.on(device), part.scored(device)
            hidden = begun.pop() if begun else model.begin(tokens, segment, past, labels=targets)
            loss_sum, _ = model.finish(hidden, segment, past, labels=targets, scored=scored)
            handed_on, of_handed_on = past.handed_on(gradients)
            torch.autograd.backward([loss_sum / labels, *handed_on], [None, *of_handed_on])
            total += loss_sum.detach()
            gradients = past.gradients()
        return total

    def _go_forward(self, model: Any, carried: Carried) -> list[Hidden]:
        """Through all segments: of those that have their graph from here what `finish` takes."""
        begun, number = [], len(self.stream)
        for segment, part in zip(self.stream, self.parts, strict=True):
            with_graph = segment.number >= number - self.graphs
            past = carried.forward(with_graph)
            tokens, labels = part.on(_device(model))
            if with_graph:
                begun.append(model.begin(tokens, segment, past, labels=labels))
            else:
                model.remember(tokens, segment, past, labels=labels)
            if segment.number < number - 1:
                carried.keep(past)
        return begun

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
