"""Whether the machine code of kernels for Hopper reads uniform registers that nothing has written, told without a GPU:

    python -m tests.kernels.machine_code                               all heads of TABLE, for an hour
    python -m tests.kernels.machine_code "scalar delta" 32 16 float16  an op of hopper_launches.CASES, K, V, dtype

ptxas 12.8, which Triton 3.6 and 3.7 bring, makes such code of some kernels: a product then takes its operand from
wherever a forgotten register points. What it makes of the same PTX is right from CUDA 13.0 on.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
UNIFORM = range(63)  # 63 is URZ
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+):")
SIZES = [
    (16, 16),
    (32, 128),
    (48, 80),
    (64, 64),
    (64, 128),
    (96, 96),
    (128, 64),
    (128, 128),
    (128, 256),
    (256, 128),
    (256, 256),
]
TABLE = [
    (op, key_dim, value_dim, dtype)
    for dtype in ("bfloat16", "float16", "float32")
    for key_dim, value_dim in SIZES
    for op in ("scalar", "none", "diagonal", "scalar delta", "none delta", "diagonal delta")
]


class Instruction(NamedTuple):
    """writes, reads: uniform registers. target: the label of a branch. always: it is not predicated."""

    address: str
    name: str
    operands: str
    writes: frozenset[int]
    reads: frozenset[int]
    target: str | None
    always: bool

    @classmethod
    def of(cls, address: str, predicate: str | None, name: str, operands: str) -> "Instruction":
        listed = [x.strip() for x in re.split(r",(?![^\[]*\])", operands)]
        target = re.search(r"`\((\.L\w+)\)", operands)
        writes, reads = set[int](), set[int]()
        for place, operand in enumerate(listed):
            registers = [int(n) for n in re.findall(r"\bUR(\d+)\b", operand)]
            if name.split(".")[0] in ("R2UR", "S2UR", "VOTEU", "REDUX") or name.startswith("U"):
                results = 1 + bool(re.fullmatch(r"U?P\d|U?PT", listed[0]))  # a predicate may come first
                if place < results and re.fullmatch(r"UR\d+", operand):
                    writes |= set(range(registers[0], registers[0] + (2 if ".64" in name or ".WIDE" in name else 1)))
                    continue
            if "gdesc[" in operand:  # two descriptors, or only the second where A comes from registers
                a_is_held = bool(re.match(r"R\d", listed[place - 1])) and place > 1
                registers = [registers[0] + n for n in range(2 if a_is_held else 0, 4)]
            elif "desc[" in operand or (name.startswith("U") and ".64" in name):  # pairs
                registers += [n + 1 for n in registers]
            reads |= set(registers)
        known = set(UNIFORM)
        always = predicate is None and not re.match(r"!?U?P\d", operands)
        return cls(
            address, name, operands, frozenset(writes & known), frozenset(reads & known), target and target[1], always
        )


def unwritten(sass: str) -> list[str]:
    """The instructions of a kernel, as nvdisasm prints them, that read a register which no way to them writes."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(Instruction.of(*found.groups()))
    written: dict[int, frozenset[int]] = {}  # before an instruction, on some way to it
    so_far: frozenset[int] = frozenset()  # what begins elsewhere, by a table of jumps, has all that stands before it
    for begin in range(len(code)):
        ways = [(begin, so_far)] if begin not in written else []
        while ways:
            place, before = ways.pop()
            if place in written and before <= written[place]:
                continue
            written[place] = before | written.get(place, frozenset())
            this, after = code[place], written[place] | code[place].writes
            base = this.name.split(".")[0]
            if base == "BRA" and this.target in labels:
                ways.append((labels[this.target], after))
            if place + 1 < len(code) and not (this.always and base in ("BRA", "EXIT", "RET", "BRX")):
                ways.append((place + 1, after))
        so_far |= code[begin].writes
    return [f"{this.address} {this.name} {this.operands}" for n, this in enumerate(code) if this.reads - written[n]]


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


def unwritten_by(compiled: Any) -> list[str]:
    """Of a compiled kernel."""
    return unwritten(disassembled(compiled.asm["cubin"]))


def main() -> None:
    import torch

    from tests.kernels import hopper_launches

    hopper_launches.pretend_there_is_a_gpu()
    op, *rest = sys.argv[1:] or [None]
    table = TABLE if op is None else [(op, int(rest[0]), int(rest[1]), rest[2])]
    for op, key_dim, value_dim, dtype in table:
        heads = 2, key_dim, value_dim, getattr(torch, dtype)
        decay, *delta = op.split()
        kind = " ".join([*(["diagonal"] if decay == "diagonal" else ["linear"] if not delta else []), *delta])
        launched = hopper_launches.launches(kind, [(4096, decay, True, heads)], compile_all=True)
        for name, kernels in launched.items():
            for kernel in kernels:
                for line in unwritten_by(kernel):
                    print(op, key_dim, value_dim, dtype, name, line, flush=True)
        print(op, key_dim, value_dim, dtype, sum(map(len, launched.values())), "kernels", flush=True)


if __name__ == "__main__":
    main()
