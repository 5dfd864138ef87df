"""Softmax attention with rotary positions and grouped keys and values, over all tokens or a window of them."""

from torch import Tensor, nn

from lasp.config import ModelConfig
from lasp.models.layers import rotate
from lasp.models.products import product
from lasp.models.sequence import SequenceOps


class SoftmaxMixer(nn.Module):
    """Causal attention (arXiv:1706.03762) with RoPE (arXiv:2104.09864) and GQA (arXiv:2305.13245), as in Llama 3."""

    window: int | None = None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.theta = config.rope_theta
        self.head_counts = [config.num_heads, config.kv_heads, config.kv_heads]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.head_counts) * config.key_dim, bias=False)
        self.out_proj = nn.Linear(config.num_heads * config.key_dim, config.hidden_size, bias=False)

    def attend(self, x: Tensor, seq: SequenceOps) -> Tensor:
        """What the heads found, [B, T, H, K]."""
        q, k, v = product(self.qkv_proj, x).unflatten(-1, (sum(self.head_counts), -1)).split(self.head_counts, dim=-2)
        if self.theta is not None:
            q, k = (rotate(y, seq.positions, self.theta) for y in (q, k))
        return seq.softmax_attention(q, k, v, window=self.window)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        return product(self.out_proj, self.attend(x, seq).flatten(2))


class WindowMixer(SoftmaxMixer):
    """The same over the last `config.window` tokens, with a gate for each head and token, 1 at first."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.window = config.window
        self.gate_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        gate = 2 * product(self.gate_proj, x).sigmoid()
        return product(self.out_proj, (self.attend(x, seq) * gate[..., None]).flatten(2))


class WithWindow(nn.Module):
    """A linear mixer for the past, and softmax attention for the last tokens: the sum of both."""

    def __init__(self, linear: nn.Module, window: WindowMixer):
        super().__init__()
        self.linear, self.window = linear, window

    def forward(self, x: Tensor, seq: SequenceOps) -> Tensor:
        return self.linear(x, seq) + self.window(x, seq)
