"""Shape of a vision-language model, from which memory and FLOPs follow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """Shape of the gated-delta-net layers of a language model."""

    indices: tuple[int, ...]
    """Indices of these layers; the others have full attention."""
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    """Tokens that the causal convolution of queries, keys and values spans."""

    @property
    def layers(self) -> int:
        """Number of these layers."""
        return len(self.indices)

    @property
    def key_dim(self) -> int:
        """Size of a token's keys; the queries have the same size."""
        return self.key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Size of a token's values."""
        return self.value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def state_elements(self) -> int:
        """Elements of a sequence's recurrent state in one layer."""
        return self.value_heads * self.key_head_dim * self.value_head_dim

    def weights(self, hidden: int) -> int:
        """Return the elements of a layer's matrices, without the MLP."""
        return hidden * (self.conv_dim + 2 * self.value_dim + 2 * self.value_heads)

    @property
    def other_parameters(self) -> int:
        """Parameters of a layer that are no matrices: convolution, decay and step biases, and the gated norm."""
        return self.conv_dim * self.conv_kernel + 2 * self.value_heads + self.value_head_dim


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """Shape of the layers whose MLP is a set of experts; a router selects some of them for each token."""

    indices: tuple[int, ...]
    """Indices of these layers; the others have one MLP."""
    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that compute a token."""
    intermediate: int
    """Intermediate size of one expert, which is a gated MLP."""

    @property
    def layers(self) -> int:
        """Number of these layers."""
        return len(self.indices)

    @property
    def token_intermediate(self) -> int:
        """Intermediate elements of a token over its experts."""
        return self.per_token * self.intermediate

    @property
    def share(self) -> float:
        """Fraction of a layer's experts that compute a token."""
        return self.per_token / self.count

    def weights(self, hidden: int) -> int:
        """Return the elements of all experts of a layer, without the router."""
        return self.count * 3 * hidden * self.intermediate

    def active_weights(self, hidden: int) -> int:
        """Return the elements of a layer's router and of one token's experts."""
        return hidden * self.count + 3 * hidden * self.token_intermediate


@dataclass(frozen=True, slots=True)
class TextShape:
    """Shape of the language model, in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """Size of one attention head."""
    intermediate: int
    vocab_size: int
    tie_word_embeddings: bool
    """Whether `lm_head` shares the embedding."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether queries and keys are normalized per head."""
    output_gate: bool = False
    """Whether the output of full attention is gated by a projection of its size."""
    float32_norms: bool = False
    """Whether norms scale in float32, or in the dtype of the weights."""
    rotary_share: float = 1.0
    """Fraction of a head that rotates with the position."""
    linear: LinearAttentionShape | None = None
    """Layers with linear attention."""
    experts: ExpertsShape | None = None
    """Layers with experts in place of one MLP."""

    @property
    def query_dim(self) -> int:
        """Size of a token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Size of a token's keys in one layer; the values have the same size."""
        return self.kv_heads * self.head_dim

    @property
    def linear_layers(self) -> int:
        """Number of layers with linear attention."""
        return self.linear.layers if self.linear else 0

    @property
    def attention_layers(self) -> int:
        """Number of layers with full attention, which have a KV cache."""
        return self.layers - self.linear_layers

    @property
    def mlp_weights(self) -> int:
        """Elements of the matrices of one layer's MLP."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.experts.layers if self.experts else 0

    @property
    def mlp_kinds(self) -> tuple[bool, ...]:
        """Kinds of MLPs that occur: whether they are experts."""
        return tuple({layer < self.expert_layers for layer in range(self.layers)})

    @property
    def expert_weights(self) -> int:
        """Elements of all experts of all layers."""
        return self.experts.layers * self.experts.weights(self.hidden) if self.experts else 0

    @property
    def idle_weights(self) -> int:
        """Elements of the experts that do not compute a token."""
        if self.experts is None:
            return 0
        idle = (self.experts.count - self.experts.per_token) * self.experts.intermediate
        return self.experts.layers * 3 * self.hidden * idle

    @property
    def attention_weights(self) -> int:
        """Elements of the matrices of one layer's full attention."""
        gate = self.query_dim if self.output_gate else 0
        return self.hidden * (2 * self.query_dim + gate + 2 * self.kv_dim)

    @property
    def matrix_weights(self) -> int:
        """Elements of all layers' matrices that compute a token; it takes one multiply-add per element."""
        linear = self.linear.layers * self.linear.weights(self.hidden) if self.linear else 0
        experts = self.experts.layers * self.experts.active_weights(self.hidden) if self.experts else 0
        mlps = (self.layers - self.expert_layers) * self.mlp_weights + experts
        return mlps + self.attention_layers * self.attention_weights + linear

    @property
    def mlp_share(self) -> float:
        """Fraction of `matrix_weights` in MLPs and experts."""
        linear = self.linear.layers * self.linear.weights(self.hidden) if self.linear else 0
        return 1 - (self.attention_layers * self.attention_weights + linear) / self.matrix_weights

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied `lm_head` counts once."""
        per_attention = (self.query_dim + 2 * self.kv_dim) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        other = self.attention_layers * per_attention + 2 * self.layers * self.hidden
        if self.linear:
            other += self.linear.layers * self.linear.other_parameters
        embeddings = self.vocab_size * self.hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.matrix_weights + self.idle_weights + other + self.hidden


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Shape of the vision tower and its mergers, in elements; sides in pixels or patches."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    patch_size: int
    """Side of a patch in pixels."""
    temporal_patch_size: int
    """Frames per patch; an image is repeated to fill it."""
    merge_size: int
    """Patches per side of one visual token."""
    out_hidden: int
    window_size: int = 0
    """Side of an attention window in pixels; 0 if all blocks attend to the whole image."""
    full_attention_blocks: tuple[int, ...] = ()
    """With windows: indices of blocks that attend to the whole image."""
    channels: int = 3
    gated_mlp: bool = False
    """Whether an MLP has three matrices (gate, up, down) instead of two."""
    norm_bias: bool = True
    """Whether norms subtract the mean and have a bias (LayerNorm), or not (RMSNorm)."""
    patch_bias: bool = True
    """Whether the patch projection has a bias."""
    position_table: int = 0
    """Learned position embeddings, a square table that is interpolated to each image's grid; 0 without."""
    deepstack_blocks: tuple[int, ...] = ()
    """Blocks whose output a merger of its own adds to the hidden states of the first text layers."""

    @property
    def token_side(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def feature_levels(self) -> int:
        """Features of a visual token: the merger's, and one per deepstack block."""
        return 1 + len(self.deepstack_blocks)

    @property
    def patch_elements(self) -> int:
        """Elements of a patch in the processor's output."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def mlp_matrices(self) -> int:
        """Matrices of a block's MLP."""
        return 3 if self.gated_mlp else 2

    @property
    def block_weights(self) -> int:
        """Elements of a block's matrices; a patch takes one multiply-add per element."""
        return 4 * self.hidden**2 + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def merger_hidden(self) -> int:
        """Size of the concatenated patches of one visual token."""
        return self.hidden * self.merge_size**2

    @property
    def merger_weights(self) -> int:
        """Elements of all mergers' matrices; a visual token takes one multiply-add per element."""
        return self.feature_levels * self.merger_hidden * (self.merger_hidden + self.out_hidden)

    @property
    def merger_parameters(self) -> int:
        """Parameters of all mergers: matrices, biases and norms."""
        biases = self.feature_levels * (self.merger_hidden + self.out_hidden)
        # The mergers of deepstack normalize after concatenation.
        norms = self._norm(self.hidden) + len(self.deepstack_blocks) * self._norm(self.merger_hidden)
        return self.merger_weights + biases + norms

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        mlp_biases = (self.mlp_matrices - 1) * self.intermediate + self.hidden
        block = self.block_weights + 4 * self.hidden + mlp_biases + 2 * self._norm(self.hidden)
        patch = (self.patch_elements + self.patch_bias) * self.hidden
        return patch + self.position_table * self.hidden + self.depth * block + self.merger_parameters

    def _norm(self, size: int) -> int:
        return size * (1 + self.norm_bias)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a vision-language model.

    Example: `load_model_shape("Qwen3-VL-8B").parameters`
    """

    model_type: str
    """Family, by the `model_type` of its config.json."""
    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """Total number of parameters; a tied `lm_head` counts once."""
        return self.text.parameters + self.vision.parameters
