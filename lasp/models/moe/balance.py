"""Keeping experts equally busy: the losses that ask for it, and a record of how busy they were.

Of the N tokens of a batch (a context, with all its segments, over all the ranks that share it) C_e chose expert e; p_e
is the mean of its normalised scores over all N. In every layer, as in arXiv:2101.03961 and, for z, arXiv:2202.08906,

    load balancing   E Σ_e C_e / (k N) · p_e        1 where all experts are chosen equally often
    z                mean of (log Σ exp logits)²

Only C and N need the other ranks' numbers, and no gradient goes through them. The losses are linear in p_e and in z's
terms, so what a rank's own tokens put there is its part of the loss: the parts add up over the ranks, as gradients do.
"""

import torch
from torch import Tensor

from lasp.config import ModelConfig
from lasp.models.moe.router import Routing
from lasp.models.sequence import SupportsSum


class ExpertBalance:
    """The balancing losses of a model's batches, and what happened in them since the last `take`."""

    def __init__(self, config: ModelConfig):
        self.experts_per_token = config.experts_per_token
        self.aux_weight, self.z_weight = config.aux_loss_weight, config.z_loss_weight
        self._record: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, routings: list[Routing], labels: Tensor, seq: SupportsSum) -> Tensor:
        """This rank's part of: the batch's balancing losses, weighted and summed over layers, times its labels.

        labels: scalar int64, this rank's number of labels. So the sum of the ranks' parts over the sum of their labels
        is the loss itself, and with several batches their mean, in which each weighs as much as it has labels.
        """
        counts = torch.stack([routing.counts for routing in routings])
        chosen, all_labels = self.sums(routings, labels, seq)
        scores = torch.stack([routing.scores for routing in routings])
        choices = chosen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)  # k N, in every layer; or no token at all
        tokens = choices / self.experts_per_token
        aux = (chosen / choices * scores / tokens).sum() * counts.shape[1]
        z = (torch.stack([routing.squared_z for routing in routings]) / tokens[:, 0]).sum()
        part = all_labels * (self.aux_weight * aux + self.z_weight * z)
        self._add(counts, part.detach().double(), labels)
        return part

    def sums(self, routings: list[Routing], labels: Tensor, seq: SupportsSum) -> tuple[Tensor, Tensor]:
        """Over the whole sequence: the tokens that chose each expert, [MoE layers, E], and the number of labels."""
        counts = torch.stack([routing.counts for routing in routings])
        total = seq.sum(torch.cat([counts.flatten(), labels[None]]))
        return total[:-1].view_as(counts), total[-1]

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's sums since the last call, which begin anew.

        Returns the tokens that chose each expert, [MoE layers, E] int64, the parts of the losses (scalar, float64) and
        the labels (scalar, int64). Raises RuntimeError if there was no batch.
        """
        if self._record is None:
            raise RuntimeError("take() was called before any batch with labels in training mode")
        record, self._record = self._record, None
        return record

    def _add(self, *values: Tensor) -> None:
        old = self._record
        self._record = values if old is None else tuple(a + b for a, b in zip(old, values, strict=True))  # type: ignore[assignment]
