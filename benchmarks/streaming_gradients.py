"""Compares a context's gradients in segments with those of the whole context, for every parameter, in fp32.

    python benchmarks/streaming_gradients.py --tokens 65536 --segment-tokens 20000
    torchrun --nproc-per-node 2 benchmarks/streaming_gradients.py --pattern LLLN --tokens 65536 --segment-tokens 30000

The error of a gradient is relative, by norm. Both ways compute layers again in backward, so that the context fits. A
model as it is initialised sees random tokens. With --exact both are also compared with the whole context's in float64.
On a CPU the model is tiny.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from ranks import join, machine, say

from lasp.config import MIXERS
from lasp.models import PRESETS, Decoder
from lasp.parallel import SequenceParallel, Stream, leave, parallelize
from lasp.parallel.apply import reduce_gradients
from lasp.parallel.groups import make_mesh
from lasp.training.streaming import StreamedBatch


@dataclass(frozen=True, kw_only=True)
class Settings:
    preset: Literal[tuple(PRESETS)] = "linear_llama3_1b"  # type: ignore[valid-type]  # on a CPU: tiny
    mixer: Literal[MIXERS] = "gated_delta_net"  # type: ignore[valid-type]
    pattern: str = "L"
    tokens: int = 1 << 16  # of the sequence, over all ranks
    segment_tokens: int = 20_000  # over all ranks
    exact: bool = False
    worst: int = 1  # so many parameters are named in each comparison


def main(settings: Settings) -> None:
    device = join()
    mesh = make_mesh(device.type, torch.arange(dist.get_world_size()), ("sp",))
    config = PRESETS[settings.preset if device.type == "cuda" else "tiny"](settings.mixer, settings.pattern)
    with device:
        model = parallelize(Decoder(config), mesh)
    model.recompute = "full"
    parallel = SequenceParallel(mesh.get_group(), layout="zigzag", aligned=config.aligned, device=device)
    numbers = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(config.vocab_size, (1, settings.tokens), generator=numbers) for _ in range(2))

    def whole() -> torch.Tensor:
        seq = parallel.sequence(settings.tokens)
        here, targets = (seq.shard(x).to(device) for x in (tokens, labels))
        loss, _ = model(here, seq, labels=targets)
        (loss / settings.tokens).backward()
        return loss.detach().double()

    def streamed() -> torch.Tensor:
        stream = Stream(parallel, settings.tokens, settings.segment_tokens)
        return StreamedBatch.of(stream, tokens, labels).backward(model, settings.tokens)

    def gradients(backward: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """By parameter; and the loss."""
        model.zero_grad(set_to_none=True)
        loss = backward()
        dist.all_reduce(loss)
        reduce_gradients(model, mesh)
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None} | {"loss": loss}

    say(f"{machine()}\n{settings}")
    one, segments = gradients(whole), gradients(streamed)
    compare("segments against the whole", segments, one, settings.worst)
    if settings.exact:
        model.double()
        exact = gradients(whole)
        compare("segments against float64", segments, exact, settings.worst)
        compare("the whole against float64", one, exact, settings.worst)
    leave()


def compare(title: str, got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], worst: int) -> None:
    errors = {name: ((got[name].double() - x).norm() / x.norm()).item() for name, x in wanted.items()}
    loss, names = errors.pop("loss"), sorted(errors, key=errors.__getitem__, reverse=True)
    largest = ", ".join(f"{errors[name]:.1e} ({name})" for name in names[:worst])
    middle = errors[names[len(names) // 2]]
    say(f"{title}: loss {loss:.1e}; gradients of {len(names)} parameters at most {largest}, in the middle {middle:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
