"""Heads as models have them: what `benchmarks/kernels.py --shapes models` times, and what tests of kernels check."""

from dataclasses import dataclass
from typing import Literal

Op = Literal[
    "none",
    "constant",
    "scalar",
    "diagonal",
    "delta",
    "gated delta",
    "diagonal delta",
    "log-linear",
    "log-linear gated delta",
]


@dataclass(frozen=True)
class Shape:
    """q_heads: those of q and k; a multiple of them are heads of v. goal: milliseconds forward and backward for 65,536
    tokens on one H200, where there is one."""

    op: Op
    q_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    goal: float | None = None

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.q_heads else f"{self.q_heads}/{self.heads}"
        return f"{self.op} {heads} x {self.key_dim}/{self.value_dim} {self.dtype}"


MODELS = (
    Shape("none", 16, 16, 128, 128, goal=1.21),  # linear attention
    Shape("constant", 16, 16, 128, 128, goal=1.33),  # RetNet, lightning attention
    Shape("scalar", 16, 16, 128, 128, goal=1.48),  # simple GLA
    Shape("scalar", 16, 16, 128, 128, "float16", goal=1.63),
    Shape("scalar", 32, 32, 64, 64, goal=1.6),
    Shape("scalar", 8, 8, 256, 256, goal=2.0),
    Shape("scalar", 8, 8, 256, 256, "float16"),
    Shape("constant", 8, 8, 256, 256),  # RetNet's usual size
    Shape("scalar", 1, 32, 128, 64, goal=1.2),  # Mamba-2, one group
    Shape("scalar", 8, 64, 128, 64, goal=2.6),  # Mamba-2, eight groups
    Shape("diagonal", 16, 16, 128, 128, goal=3.0),  # GLA
    Shape("diagonal", 8, 8, 128, 256),
    Shape("gated delta", 16, 16, 128, 128, goal=2.3),  # Gated DeltaNet
    Shape("gated delta", 16, 16, 128, 128, "float16", goal=2.53),
    Shape("gated delta", 8, 16, 128, 128, goal=2.4),
    Shape("gated delta", 16, 32, 128, 128, goal=4.8),  # Qwen3-Next
    Shape("gated delta", 32, 32, 64, 64, goal=2.8),
    Shape("gated delta", 8, 8, 128, 256, goal=2.6),
    Shape("gated delta", 8, 8, 256, 256, goal=4.5),
    Shape("diagonal delta", 16, 16, 128, 128, goal=5.5),  # Kimi Delta Attention
)
