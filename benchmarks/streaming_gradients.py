"""Compares a context's gradients in segments with those of the whole context, for every parameter, in fp32.

    python benchmarks/streaming_gradients.py --tokens 65536 --segment-tokens 20000
    torchrun --nproc-per-node 2 benchmarks/streaming_gradients.py --pattern LLLN --tokens 65536 --segment-tokens 30000

The error of a gradient is relative, by norm. Both ways compute layers again in backward, so that the context fits. A
model as it is initialised sees random tokens. On a CPU it is tiny.
"""

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

    def gradients(backward) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = backward()
        dist.all_reduce(loss)
        reduce_gradients(model, mesh)
        return loss.item(), {name: x.grad.cpu() for name, x in model.named_parameters() if x.grad is not None}

    (loss, wanted), (got_loss, got) = gradients(whole), gradients(streamed)
    errors = {name: ((got[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}
    worst = max(errors, key=errors.__getitem__)
    say(f"{machine()}\n{settings}")
    say(f"loss: relative error {abs(got_loss / loss - 1):.1e}")
    say(f"gradients of {len(errors)} parameters: relative error at most {errors[worst]:.1e}, of {worst}")
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings))
