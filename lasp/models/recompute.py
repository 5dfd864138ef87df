"""What a decoder keeps of its layers' activations until backward, by policy.

    none        all that backward reads
    selective   of each layer its input, matrix products, and what operations over the sequence gave; the cheap rest
                (norms, activations, gates, convolutions) runs again in the backward pass
    full        its input alone; all of it runs again, but for the MLP's last product

Exchanges between ranks are repeated with `full` only. Mixtures of experts run again with both.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

from torch.utils.checkpoint import checkpoint

from lasp.kernels.once import runs
from lasp.models.offload import HostMemory

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def recomputing(policy: Policy, host: HostMemory | None) -> Callable[..., Any]:
    """Calls layers as (layer, x, seq) so that they run again in backward; `host` takes their inputs x till then."""

    def call(layer: Callable[..., Any], x: Any, seq: Any) -> Any:
        with nullcontext() if host is None else host.hooks():
            return checkpoint(
                layer,
                x,
                seq,
                use_reentrant=False,
                preserve_rng_state=False,  # blocks draw no random numbers
                context_fn=partial(runs, policy == "selective"),
            )

    return call
