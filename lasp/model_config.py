"""What a model is: the shape of a decoder, and the words for its layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from lasp.fields import Allowed, Count, CountOrZero, NotNegative, Positive, check_fields, require
from lasp.own import OWN

LINEAR, SOFTMAX = "L", "N"
MIXERS = (
    "linear",
    "lightning",
    "retention",
    "mamba2",
    "gla",
    "hgrn2",
    "delta_net",
    "gated_delta_net",
    "gated_delta_product",
    "kda",
    "log_linear_mamba2",
    "log_linear_gated_delta_net",
)
FEATURE_MAPS = ("identity", "elu", "relu", "silu", "hedgehog")
WITH_FEATURES = ("linear", "lightning", "retention", "gla")  # mixers with a feature map of q and k
OPTIONAL_CONV = (*WITH_FEATURES, "hgrn2")  # those that have a short convolution only if it is asked for
DELTA = ("delta_net", "gated_delta_net", "gated_delta_product", "kda")  # the delta rule's
LOG_LINEAR = "log_linear_"  # the prefix of mixers that keep a state for each level of the past (docs/log-linear.md)
LEVELS = 24  # of these mixers: for contexts of up to 2^23 tokens
Own = Annotated[str, Allowed("MODULE:NAME", lambda name: OWN.fullmatch(name) is not None)]
if TYPE_CHECKING:
    Mixer = str
else:
    Mixer = Literal[MIXERS] | Annotated[str, Allowed("MODULE:CLASS", lambda name: OWN.fullmatch(name) is not None)]
FeatureMap = Annotated[str, Allowed(f"one of {', '.join(FEATURE_MAPS)}", FEATURE_MAPS.__contains__)]
Pattern = Annotated[
    str,
    Allowed(
        f"at least one letter and only the letters {LINEAR} and {SOFTMAX}",
        lambda letters: bool(letters) and set(letters) <= {LINEAR, SOFTMAX},
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder.

    `pattern` is a string of L (linear-attention layer, of the kind `mixer` names) and N (softmax layer); it is repeated
    until there are `num_layers` layers.
    """

    vocab_size: CountOrZero  # 0: as many as the run's tokenizer has
    hidden_size: Count  # of a token's vector between layers
    num_layers: Count  # each a mixer of tokens and an MLP
    num_heads: Count  # of every layer
    intermediate_size: Count  # of the MLPs, between their products
    pattern: Pattern = "LLLN"  # of the layers, repeated: L linear, N softmax
    mixer: Mixer = "gated_delta_net"  # of the linear layers: one of lasp's, or MODULE:CLASS of one's own
    model_class: Own | None = None  # MODULE:CLASS of one's own model in the place of lasp.models.Decoder
    head_dim: Count | None = None  # key size of every head; hidden_size // num_heads if None
    value_head_dim: Count | None = None  # value size of the linear layers' heads; head_dim if None
    num_kv_heads: Count | None = None  # key/value heads of the softmax layers (GQA); num_heads if None
    short_conv: bool = False  # of q, k and v, for the mixers that have none of their own
    conv_width: Count = 4  # of the mixers that have a short convolution
    feature_map: FeatureMap | None = None  # of q and k, for the mixers that have one; the mixer's own if None
    num_householder: Count = 2  # steps of the delta rule for each token, of gated_delta_product
    negative_eigenvalues: bool | None = None  # beta of the delta rule reaches 2, not 1; the mixer's own if None
    window: Count | None = None  # of softmax attention beside the linear layers' states: the last so many tokens
    rope_theta: Positive | None = 500_000.0  # the base of rotary embeddings; None: softmax layers have none (NoPE)
    norm_eps: Positive = 1e-6  # added to the mean square in norms
    tie_embeddings: bool = True  # the head's weight is the embedding's
    init_std: NotNegative = 0.02  # of the matrices at the beginning
    decay_init: Positive = 1.0  # how fast gates like Mamba-2's forget at the beginning, times Mamba-2's rates
    num_experts: CountOrZero = 0  # of each mixture-of-experts layer; 0: every layer has an MLP of intermediate_size
    experts_per_token: Count = 2  # those with the highest scores
    expert_intermediate_size: Count | None = None  # of each expert; intermediate_size if None
    num_shared_experts: CountOrZero = 0  # besides, for every token
    moe_every: Count = 1  # the last of so many layers has experts in its MLP's place
    router_scores: Literal["softmax", "sigmoid"] = "softmax"  # how a router makes scores of its logits
    normalize_expert_weights: bool = True  # those of a token's experts to the sum 1
    aux_loss_weight: NotNegative = 0.01  # of the load-balancing loss
    z_loss_weight: NotNegative = 0.0  # of the router's z-loss
    expert_bias_rate: NotNegative = 0.0  # of balancing by biases instead of a loss; 0: no biases

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.num_layers % len(self.pattern) == 0,
            "num_layers",
            self.num_layers,
            f"a multiple of {self.pattern!r}'s length",
        )
        if self.head_dim is None:
            require(
                self.hidden_size % self.num_heads == 0,
                "hidden_size",
                self.hidden_size,
                f"a multiple of num_heads={self.num_heads}",
            )
        require(self.key_dim % 2 == 0, "head_dim", self.key_dim, "an even number (rotary embedding)")
        require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        has_features = self.feature_map is None or self.mixer in WITH_FEATURES
        expected = f"None with mixer={self.mixer!r} (those with a feature map: {', '.join(WITH_FEATURES)})"
        require(has_features, "feature_map", self.feature_map, expected)
        expected = f"False with mixer={self.mixer!r} (those without a short convolution: {', '.join(OPTIONAL_CONV)})"
        require(not self.short_conv or self.mixer in OPTIONAL_CONV, "short_conv", True, expected)
        has_beta = self.negative_eigenvalues is None or self.plain_mixer in DELTA
        expected = f"None with mixer={self.mixer!r} (those of the delta rule: {', '.join(DELTA)})"
        require(has_beta, "negative_eigenvalues", self.negative_eigenvalues, expected)
        rotates = self.mixer == "retention" and LINEAR in self.pattern
        require(self.rope_theta is not None or not rotates, "rope_theta", None, "a number with mixer='retention'")
        if self.num_experts:
            chosen, every = self.experts_per_token, self.moe_every
            require(
                1 <= chosen <= self.num_experts,
                "experts_per_token",
                chosen,
                f"between 1 and num_experts={self.num_experts}",
            )
            require(1 <= every <= self.num_layers, "moe_every", every, f"between 1 and num_layers={self.num_layers}")

    @property
    def is_own(self) -> bool:
        """Whether code of the user's is in it, of which plans and other formats know nothing."""
        return self.model_class is not None or self.mixer not in MIXERS

    @property
    def expert_size(self) -> int:
        return self.intermediate_size if self.expert_intermediate_size is None else self.expert_intermediate_size

    def has_experts(self, layer: int) -> bool:
        """Whether layer 0 <= layer < num_layers is a mixture of experts."""
        return self.num_experts > 0 and (layer + 1) % self.moe_every == 0

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def value_dim(self) -> int:
        return self.value_head_dim or self.key_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def layers(self) -> str:
        """One letter per layer."""
        return self.pattern * (self.num_layers // len(self.pattern))

    @property
    def attending(self) -> int:
        """How many layers have softmax attention, over all tokens or a window."""
        return self.layers.count(SOFTMAX) if self.window is None else self.num_layers

    @property
    def plain_mixer(self) -> str:
        """The mixer without the prefix of log-linear ones."""
        return self.mixer.removeprefix(LOG_LINEAR)

    @property
    def aligned(self) -> bool:
        """Whether ranks' units have to be powers of two: `aligned` of lasp.parallel's sequences."""
        return self.mixer != self.plain_mixer and LINEAR in self.pattern

    @property
    def steps(self) -> int:
        """How many times a token changes a linear layer's state."""
        return self.num_householder if self.mixer == "gated_delta_product" else 1

    def local_tokens(self, tokens: int, ranks: int) -> int:
        """Of each of so many ranks that share a sequence, with padding."""
        local = -(-tokens // ranks)
        return 1 << (local - 1).bit_length() if self.aligned and ranks > 1 else local

    def states(self, tokens: int) -> int:
        """How many a linear layer keeps of so many tokens, at most."""
        return tokens.bit_length() if self.aligned else 1
