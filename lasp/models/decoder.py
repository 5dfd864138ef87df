"""The language model: embedding, blocks of a mixer and an MLP or experts, head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.config import ModelConfig, require
from lasp.models.layers import RMSNorm, SwiGLU, add_and_norm, at_least_float32
from lasp.models.loss import IGNORE, linear_cross_entropy, require_ids
from lasp.models.mixers import make_mixer
from lasp.models.moe import ExpertBalance, MixtureOfExperts, Router, Routing
from lasp.models.offload import HostMemory
from lasp.models.past import Past
from lasp.models.recompute import Policy, by_layer, recomputing
from lasp.models.sequence import SequenceOps
from lasp.own import load_own


class Hidden(NamedTuple):
    """x: what the head takes, [B, T, hidden]. routings: of the layers with experts."""

    x: Tensor
    routings: list[Routing]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): [B, T, hidden] -> the same, and what a router did in it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = make_mixer(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp: nn.Module
        if config.has_experts(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, seq: SequenceOps, for_past: bool = False) -> tuple[Tensor, Routing | None]:
        """for_past: nothing is wanted but what the mixer and a router leave behind."""
        x, normed = add_and_norm(self.mixer_norm, x)
        x, normed = add_and_norm(self.mlp_norm, x, self.mixer(normed, seq))
        if isinstance(self.mlp, MixtureOfExperts):
            y, routing = self.mlp(normed, seq)
            return x + y, routing
        return x if for_past else x + self.mlp(normed), None


class Decoder(nn.Module):
    """A causal language model whose layers `config.pattern` and `config.mixer` choose.

    To build a large one without holding it twice: construct it under `torch.device("meta")`, then
    `to_empty(device=...)` and `init_weights()`. Do so before loading a checkpoint too: not all buffers are in it.

    recompute: what is kept of the blocks until backward (see lasp.models.recompute).
    recompute_layers: so many blocks follow that policy, the others the one that keeps more; all of them if None.
    offload_activations: the blocks' inputs wait for backward in host memory, where blocks are recomputed.
    balance: how busy the experts were, if there are any; in training mode, for batches with labels.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(config.vocab_size > 0, "vocab_size", 0, "the tokenizer's (0 is for recipes)")
        self.config = config
        self.recompute: Policy = "none"
        self.recompute_layers: int | None = None
        self.offload_activations = False
        self.balance = ExpertBalance(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter and buffer anew, from `generator` or the global seed alone: ranks with one seed agree.

        Matrices are normal with `config.init_std`, those that write into the residual stream divided by sqrt(2 layers).
        """
        for name, module in self.named_modules():
            self.init_module(name, module, generator)

    @torch.no_grad()
    def init_module(self, name: str, module: Any, generator: torch.Generator | None = None) -> None:
        """The same for what is one module's own, without those within it; name: in `named_modules`."""
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            scale = (2 * self.config.num_layers) ** -0.5 if name.endswith("out_proj") else 1.0
            nn.init.normal_(module.weight, std=std * scale, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std, generator=generator)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif hasattr(module, "init_parameters"):
            module.init_parameters(generator)

    def move_expert_biases(self, load: Tensor) -> None:
        """After each step, with the load [MoE layers, E] of all its tokens on all ranks: see `Router.move_bias`."""
        routers = [module for module in self.modules() if isinstance(module, Router)]
        for router, busy in zip(routers, load, strict=True):
            router.move_bias(busy)

    @overload
    def forward(self, tokens: Tensor, seq: SequenceOps, *, memory: Past | None = None) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        seq: SequenceOps,
        *,
        labels: Tensor,
        scored: Tensor | None = None,
        memory: Past | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(self, tokens, seq, *, labels=None, scored=None, memory=None):
        """Logits of the next token at every token, or their loss.

        Args:
            tokens: [B, T] int64, this rank's tokens in the local order of `seq`.
            seq: what leads from token to token, made for this batch.
            labels: [B, T] int64, the token that follows each token (shifted before sharding), -100 where there is none.
                Padding counts as -100 whatever stands there.
            scored: [N] int64, places in labels.flatten(), all those of labels that are not -100: the head then sees
                only these tokens. All if None.
            memory: what came before these tokens; read, and updated with them.

        Returns:
            Logits [B, T, vocabulary]. With labels (loss_sum, count): the sum of the cross-entropies over this rank's
            labels in float32 (float64 for float64), and the number of those labels in int64; `seq.mean` takes them.
            With experts and in training mode the sum includes this rank's part of the balancing losses (see
            lasp.models.moe.balance), so that the mean is that of the cross-entropy plus these losses.

        Raises:
            ValueError: tokens or labels that do not fit `seq` or the vocabulary, or memory with a `seq` that is not one
                rank's whole sequence; places without labels.
        """
        require(scored is None or labels is not None, "scored", "places", "None without labels")
        hidden = self._run(tokens, seq, labels, memory)
        return self.logits(hidden.x) if labels is None else self._score(hidden, seq, labels, scored, memory)

    @torch.no_grad()
    def remember(self, tokens: Tensor, seq: SequenceOps, memory: Past, *, labels: Tensor | None = None) -> None:
        """`forward` for nothing but the memory: there are no logits.

        labels: as in `forward`; in training mode what balancing losses sum over the sequence is summed, if given.
        """
        self._sum(self._run(tokens, seq, labels, memory, for_past=True), seq, labels, memory)

    def begin(self, tokens: Tensor, seq: SequenceOps, memory: Past, *, labels: Tensor) -> Hidden:
        """`forward` up to the head, for `finish`, which may come when more of the sequence has been seen."""
        hidden = self._run(tokens, seq, labels, memory)
        with torch.no_grad():
            self._sum(hidden, seq, labels, memory)
        return hidden

    def finish(
        self, hidden: Hidden, seq: SequenceOps, memory: Past, *, labels: Tensor, scored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses and their number, as of `forward`."""
        return self._score(hidden, seq, labels, scored, memory)

    def _score(
        self, hidden: Hidden, seq: SequenceOps, labels: Tensor, scored: Tensor | None, memory: Past | None
    ) -> tuple[Tensor, Tensor]:
        (x, routings), labels = hidden, _of_tokens(labels, seq)
        if scored is not None:
            x, labels = (y.flatten(0, 1).index_select(0, scored) for y in (x, labels))
        loss_sum, count = self._loss(x, labels)
        if routings and self.training:
            loss_sum = loss_sum + self.balance.loss(routings, count, seq if memory is None else memory.whole(seq))
        return loss_sum, count

    def _sum(self, hidden: Hidden, seq: SequenceOps, labels: Tensor | None, memory: Past) -> None:
        """What balancing losses sum over a sequence, of which these tokens are a part."""
        if hidden.routings and self.training and labels is not None:
            self.balance.sums(hidden.routings, (_of_tokens(labels, seq) != IGNORE).sum(), memory.whole(seq))

    def _run(
        self,
        tokens: Tensor,
        seq: SequenceOps,
        labels: Tensor | None,
        memory: Past | None,
        for_past: bool = False,
    ) -> Hidden:
        """Raises ValueError for tokens or labels as in `forward`. for_past: the head will not ask."""
        local = seq.positions.shape[0]
        require(
            tokens.ndim == 2 and tokens.shape[1] == local, "tokens", list(tokens.shape), f"[B, {local}], as seq has"
        )
        require(
            labels is None or labels.shape == tokens.shape,
            "labels",
            labels is not None and list(labels.shape),
            f"the shape of tokens {list(tokens.shape)}",
        )
        if not tokens.is_cuda:  # where the embedding's lookup asserts as much
            require_ids("tokens", tokens, self.config.vocab_size)
        x = self.embedding(tokens)
        return self.hidden_states(x, seq, memory=memory, recompute=self._recompute(), for_past=for_past)

    def hidden_states(
        self,
        x: Tensor,
        seq: Any,
        *,
        memory: Past | None = None,
        recompute: Callable[..., Any] | None = None,
        inputs: list[Tensor] | None = None,
        for_past: bool = False,
    ) -> Hidden:
        """Embedded tokens x [B, T, hidden] behind all blocks and the last norm; and the routings.

        seq: as in `forward`, or `Rows` for a memory.
        recompute: `torch.utils.checkpoint.checkpoint` or its like, to call the blocks by.
        inputs: gets each block's input.
        for_past: nothing is wanted but what the blocks leave in the memory, and the routings.
        """
        routings: list[Routing] = []
        layer: Any
        for index, layer in enumerate(self.layers):
            if inputs is not None:
                inputs.append(x)
            if for_past and index == len(self.layers) - 1:
                layer = partial(layer, for_past=True)
            if memory is not None:
                layer = memory.bind(layer, index)
            x, routing = layer(x, seq) if recompute is None else recompute(layer, x, seq)
            if routing is not None:
                routings.append(routing)
        if memory is not None:
            memory.advance(seq)
        return Hidden(x if for_past else self.norm(x), routings)

    def logits(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]."""
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden]: the embedding's, if they are tied."""
        return (self.embedding if self.head is None else self.head).weight

    @property
    def checkpoint_layers(self) -> bool:
        """Whether blocks are recomputed; True stands for the policy "full"."""
        return self.recompute != "none"

    @checkpoint_layers.setter
    def checkpoint_layers(self, value: bool) -> None:
        self.recompute, self.recompute_layers = "full" if value else "none", None

    def _recompute(self) -> Callable[..., Any] | None:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return None
        policies = by_layer(self.recompute, self.recompute_layers, self.config.layers)
        return recomputing(policies, HostMemory() if self.offload_activations else None)

    def _loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropies and their number."""
        if self.head is None or type(self.head) is nn.Linear:
            return linear_cross_entropy(x, self.head_weight, labels)
        # What has taken the head's place, such as an adapter around it, is more than a weight.
        logits, labels = at_least_float32(self.head(x)).flatten(0, -2), labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), (labels != IGNORE).sum()


def make_model(config: ModelConfig) -> Decoder:
    """A decoder, or what stands in its place.

    Raises ValueError if that is a class of one's own that is not there.
    """
    return (Decoder if config.model_class is None else load_own("model_class", config.model_class))(config)


def _of_tokens(labels: Tensor, seq: SequenceOps) -> Tensor:
    """The labels, but -100 for padding."""
    return labels.masked_fill(~seq.valid.to(labels.device), IGNORE)
