"""All ranks make the same call, or all of them refuse it: nobody waits for a message that never comes.

Before a call that sends messages, each rank says in one small message of its own what it is about to do. So whatever
one rank alone gets wrong (bad arguments, other options, another operation altogether) is a ValueError on every rank.
The same goes for a call's backward pass, to which a rank comes only if its loss depends on what the call returned.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from typing import TypeVar

import torch
from torch import Tensor

from lasp.parallel import comm
from lasp.parallel.comm import Group

Made = TypeVar("Made", Tensor, Tensor | None)
_calls = count()  # of this process


@dataclass(frozen=True)
class Agreed:
    """A call that all ranks of a group make. number: rank 0's of its calls; None if nothing was said of it."""

    group: Group
    call: str
    number: int | None = None

    def in_backward(self, made: Made, *others: str) -> Made:
        """`made`, the first result of an autograd function of this call. Before backward comes to that function, and
        sends messages, the ranks agree that it is this call's on all of them.

        others: the function's other results, of which there are gradients on all ranks or on none.
        """
        if self.number is None or made is None or made.grad_fn is None:
            return made

        def agree_again(grads: tuple[Tensor | None, ...]) -> None:
            given = {f"gradient of {name}": d is not None for name, d in zip(others, grads[1:], strict=True)}
            facts = {"number of the call": self.number} | given
            agree(self.group, lambda: facts, call=f"backward of {self.call}")

        made.grad_fn.register_prehook(agree_again)
        return made


def agree(group: Group, check: Callable[[], object], *, call: str = "a check") -> Agreed:
    """Runs `check` on every rank; raises ValueError on all of them if it failed on one or if what it returned differs.

    The value returned stands for what must be equal on all ranks (shapes, dtypes, options): a dict by name, or anything
    else; it is compared by its repr, and so is `call`, what the ranks are about to do. Any exception is a failure; on
    one rank alone it is raised as it is. Costs one small all-gather and a look at its result on the host.
    """
    if comm.size(group) == 1:
        check()
        return Agreed(group, call)
    error, facts = None, {"call": call}
    try:
        facts |= _facts(check())
    except Exception as raised:
        error = raised
    checksum = zlib.crc32(repr(facts).encode())
    device = comm.message_device(group)
    mine = torch.tensor([error is not None, checksum, next(_calls)], dtype=torch.int64, device=device)
    flags = comm.replicate(mine, group, f"agreement on {call}").tolist()
    if any(failed for failed, _, _ in flags):
        told = comm.gather_objects(None if error is None else _story(error), group)
        raise ValueError(_list({rank: story for rank, story in enumerate(told) if story is not None})) from error
    if len({checksum for _, checksum, _ in flags}) > 1:
        raise ValueError(_differences(comm.gather_objects(facts, group)))
    return Agreed(group, call, number=flags[0][2])


def agree_on_cpus(group: Group, check: Callable[[], object], *, call: str) -> Agreed:
    """`agree`, for calls that are made all the time: where messages live on GPUs, whose host would have to wait for
    them, each rank looks at its own arguments only."""
    if comm.message_device(group).type == "cpu":
        return agree(group, check, call=call)
    check()
    return Agreed(group, call)


def signature(**tensors: Tensor | None) -> dict[str, object]:
    """Dtype and shape of each."""
    return {name: None if x is None else (x.dtype, list(x.shape)) for name, x in tensors.items()}


def gradients(*tensors: Tensor | None, of: str = "any input") -> dict[str, object]:
    """Whether backward will come to an operation on these, and send messages of its own."""
    return {f"gradient of {of}": torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)}


def _facts(value: object) -> dict[str, str]:
    return {name: repr(x) for name, x in value.items()} if isinstance(value, dict) else {"arguments": repr(value)}


def _differences(ranks: list[dict[str, str]]) -> str:
    """What the ranks' facts do not have in common."""
    same_call = len({facts["call"] for facts in ranks}) == 1
    told = []
    for name in dict.fromkeys(chain(*ranks)) if same_call else ["call"]:
        values = dict(enumerate(facts.get(name, "nothing") for facts in ranks))
        if len(set(values.values())) > 1:
            told.append(f"{name}: {_list(values)}")
    where = f" in {ranks[0]['call']}" if same_call else ""
    return f"got different arguments on different ranks, expected the same{where}: {', '.join(told)}"


def _story(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _list(told: dict[int, str]) -> str:
    return "; ".join(f"rank {rank}: {text}" for rank, text in told.items())
