"""What a decoder keeps of its layers' activations until backward, by policy.

    none        all that backward reads
    selective   of each layer its input, matrix products, and what operations over the sequence gave; the cheap rest
                (norms, activations, gates, convolutions) runs again in the backward pass
    full        its input alone; all of it runs again, but for the MLP's last product

Exchanges between ranks are repeated with `full` only. Mixtures of experts run again with both. Where there is memory
for less recomputation in some layers, softmax layers have it first, for their operation takes longer the longer the
context is, and then the last ones, whose backward comes first and frees what they kept.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lasp.config import SOFTMAX
from lasp.kernels.once import runs
from lasp.models.offload import HostMemory

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = get_args(Policy)  # each keeps less than the one before
_AGAIN = ("conv", "grouped_matmul", "experts")  # in the names of nodes
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def by_layer(policy: Policy, layers: int | None, letters: str) -> list[Policy]:
    """The policy of each of the layers of these letters: the given one for so many (None: all), the one that keeps more
    for the others, which are softmax layers first, and of each kind the last ones."""
    order = sorted(range(len(letters)), key=lambda index: (letters[index] == SOFTMAX, index))
    more = POLICIES[max(0, POLICIES.index(policy) - 1)]
    follow = order[:layers]
    return [policy if index in follow else more for index in range(len(letters))]


def recomputing(policies: Iterable[Policy], host: HostMemory | None) -> Callable[..., Any]:
    """Calls a model's layers in turn, perhaps several times, as (layer, x, seq), each by its policy; `host` takes the
    inputs x of all that run again."""
    coming = cycle(policies)

    def call(layer: Callable[..., Any], x: Any, seq: Any) -> Any:
        policy = next(coming)
        if policy == "none":
            return layer(x, seq)
        with nullcontext() if host is None else host.hooks():
            return checkpoint(
                layer,
                x,
                seq,
                use_reentrant=False,
                preserve_rng_state=False,  # blocks draw no random numbers
                context_fn=_in_graphs(policy)
                if torch.compiler.is_compiling()
                else partial(runs, policy == "selective"),
            )

    return call


def _in_graphs(policy: Policy) -> Callable[..., Any]:
    """The same for layers that torch.compile traces, whose compiler sees to what is kept."""
    return partial(create_selective_checkpoint_contexts, _keeps_dear if policy == "selective" else _keeps_nothing)


def _keeps_dear(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products, and operations over the sequence but for convolutions and experts."""
    kept = op in _PRODUCTS or (op.namespace == "lasp" and not any(again in op.name() for again in _AGAIN))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keeps_nothing(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE
