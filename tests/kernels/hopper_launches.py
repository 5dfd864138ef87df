"""What ops launch on a Hopper GPU, and whether the kernels for Hopper among it compile, told without one:

    python -m tests.kernels.hopper_launches KIND        a line of JSON for every kernel; KIND: see CASES

An op runs as in lasp.kernels.triton.dispatch, on tensors without memory, so that kernels, arguments and constants are
those of a launch. As there, a kernel that needs more shared memory than there is has fewer stages.
"""

import json
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from tests.kernels import machine_code

EVERYWHERE = {  # kernels that Hopper has no others for
    "scalar.gates._cumulate",
    "scalar.gates._chunk_gate_grads",
    "scalar.chunk_states._chunk_states",
    "scalar.chunk_states._states_and_gradients",
    "shared.state_passing._pass_states",
    "shared.matrix_passing._pass_by_matrix",
    "shared.operands._sum_heads",
    "shared.matrix_passing._add_incoming",
    "delta.secondary._secondary_scores",
    "delta.secondary._secondary_gradients",
    "diagonal.states._scan_states",
    "diagonal.secondary._secondary",
}
SHARED_MEMORY = 227 * 1024
HEADS = 16
WIDE, SMALL = (16, 128, 128, torch.bfloat16), (8, 64, 64, torch.float16)  # q/k heads, K, V
Case = tuple[int, str, bool, tuple[int, int, int, torch.dtype]]
CASES: dict[str, list[Case]] = {  # tokens; whose decay is none, one a head, one a token or one a channel; whether
    # summaries are wanted; heads
    "linear": [
        (65536, "none", True, WIDE),
        (65536, "constant", False, WIDE),
        (65536, "scalar", True, WIDE),
        (65536, "scalar", True, SMALL),  # two heads a program
        (65536, "scalar", True, (1, 128, 64, torch.bfloat16)),  # those of a group at once
    ],
    "delta": [
        (65536, "scalar", True, WIDE),
        (64, "none", False, WIDE),  # in one tile: nothing comes in or is asked for
        (65536, "scalar", True, SMALL),
    ],
    "diagonal": [(65536, "diagonal", wanted, WIDE) for wanted in (True, False)],
    "diagonal delta": [
        (65536, "diagonal", True, WIDE),
        (64, "diagonal", False, WIDE),
    ],
}


def constant_operands(ptx: str) -> set[str]:
    """Registers that are constants and with which more than one product begins: ptxas of CUDA 12.8 has set such a one
    only after the first product that read it."""
    operands = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, *\{([^}]*)\}", ptx)
    constants = re.findall(r"mov\.[bu](?:16|32)\s+(%\w+), -?\d+;", ptx)
    read = Counter(register.strip() for four in operands for register in four.split(","))
    return {register for register in constants if read[register] > 1}


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.__name__}".removeprefix("lasp.kernels.triton.")


def is_for_hopper(name: str) -> bool:
    return name.startswith("hopper.")


def strangers(names: set[str]) -> set[str]:
    """Kernels in whose place those for Hopper should have been launched."""
    assert names, "no kernel was launched"
    return {name for name in names - EVERYWHERE if not is_for_hopper(name)}


def pretend_there_is_a_gpu() -> None:
    """Before lasp's kernels are imported."""
    triton.__version__ = "3.6.0"  # whatever it is: with that one the kernels for Hopper serve
    there = {"target": GPUTarget("cuda", 90, 32), "device": 0, "stream": 0}
    current = {f"get_current_{name}": lambda *_, x=x: x for name, x in there.items()}
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY})
    driver.set_active(SimpleNamespace(**current, utils=utils))
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: there["device"]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)


class Compiler:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compiled(*args: Any, **constants: Any) -> Any:
            made = self.kernel.run(*args, grid=grid, warmup=True, **constants)
            if made.metadata.shared > SHARED_MEMORY:
                raise OutOfResources(made.metadata.shared, SHARED_MEMORY, "shared memory")
            return made

        return compiled


def launches(kind: str, cases: list[Case], compile_all: bool = False) -> dict[str, list[Any]]:
    """By the kernels' names: what they were compiled to, those for Hopper or all."""
    from lasp.kernels.segments import Segments
    from lasp.kernels.triton import dispatch, launch
    from lasp.kernels.triton.delta.op import TritonDelta
    from lasp.kernels.triton.diagonal.op import TritonDiagonal
    from lasp.kernels.triton.scalar.op import TritonLinear
    from tests.parallel.inputs import inputs_of

    found: dict[str, list[Any]] = {}

    def note(kernel: JITFunction, *args: Any, grid: tuple[int, ...], **constants: Any) -> None:
        compiled = found.setdefault(name_of(kernel), [])
        if compile_all or is_for_hopper(name_of(kernel)):
            compiled.append(launch.launch_first(Compiler(kernel), grid, args, constants)[0])

    JITFunction.warmup = note

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for tokens, decay, wanted, (q_heads, key_dim, value_dim, dtype) in cases:
        rows = 1, tokens, HEADS
        shape = {"none": None, "constant": (HEADS,), "scalar": rows, "diagonal": (*rows, key_dim)}[decay]
        gates = None if shape is None else empty(*shape, dtype=torch.float32)
        q, k = (empty(1, tokens, q_heads, key_dim, dtype=dtype) for _ in range(2))
        v = empty(1, tokens, HEADS, value_dim, dtype=dtype)
        beta = empty(1, tokens, HEADS, dtype=dtype) if "delta" in kind else None
        x = inputs_of(q, k, v, gates, beta, key_dim**-0.5, Segments(1, tokens, None))
        op = {"linear": TritonLinear, "diagonal": TritonDiagonal}.get(kind, TritonDelta)()
        launch.run_dry(lambda op=op, x=x, wanted=wanted: dispatch.dry_run(op, x, wanted, backward=True))
    return found


if __name__ == "__main__":
    pretend_there_is_a_gpu()
    for name, compiled in launches(sys.argv[1], CASES[sys.argv[1]]).items():
        asm = [kernel.asm["ptx"] for kernel in {id(kernel): kernel for kernel in compiled}.values()]
        facts = {
            "name": name,
            "compiled": len(asm),
            "multiplies": all("wgmma" in ptx or "mma.sync" in ptx for ptx in asm),
            "waits": all("griddepcontrol.wait" in ptx for ptx in asm),
            "constants": sum(len(constant_operands(ptx)) for ptx in asm),
            "unwritten": [line for kernel in compiled for line in machine_code.unwritten_by(kernel)],
        }
        print(json.dumps(facts))
