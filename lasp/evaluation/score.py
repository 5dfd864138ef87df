"""What a model says of the labels of a batch: its losses, and which of them are its likeliest next tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.models import Decoder
from lasp.models.layers import at_least_float32

ROWS = 4096  # of logits at a time


@dataclass(frozen=True)
class Scores:
    """Of this rank's labels, in local order: where in the batch they stand [N, 2] (row, token), their cross-entropies
    [N] in nats, in float32 (float64 for float64), and whether each is the likeliest token [N]."""

    places: Tensor
    losses: Tensor
    right: Tensor


@torch.inference_mode()
def score(model: Decoder, tokens: Tensor, labels: Tensor, seq: Any) -> Scores:
    """tokens, labels: [B, T_local], as in the decoder's forward; labels of -100 and of padding are left out."""
    places = ((labels >= 0) & seq.valid.to(labels.device)).nonzero()
    x, _ = model.hidden_states(model.embedding(tokens), seq)
    targets = labels[places[:, 0], places[:, 1]]
    losses, right = [], []
    for rows, target in zip(places.split(ROWS), targets.split(ROWS), strict=True):
        logits = at_least_float32(model.logits(x[rows[:, 0], rows[:, 1]]))
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return Scores(places, torch.cat(losses), torch.cat(right))
