"""KV cache of a vLLM engine: blocks of keys and values, and of the states of linear-attention layers.

vLLM 0.32 has one pool of equal blocks. Layers are put into groups of equal size, each of one kind, and a block holds
a number of tokens of all layers of a group. A group of linear-attention layers uses a block for a state. The blocks
are so large that a state fits, and the states are padded to that size:

    full attention     [16 tokens][16 tokens]...                    without linear-attention layers
    full attention     [528 tokens      ][528 tokens      ]...      Qwen3.5-4B
    linear attention   [state   |padding][state   |padding]         two per sequence and group

With prefix caching, which is always on, a sequence holds two states: the current one, and the last that is cached
(`mamba_cache_mode` is `align`). States of other prefixes are evicted when blocks are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.families import LinearAttentionShape, TextShape

KERNEL_BLOCK_TOKENS = 16
"""Tokens per block of the KV cache on GPUs without linear attention; larger blocks are multiples."""
STATES_PER_SEQUENCE = 2
_STATE_ELEMENT_BYTES = 4
"""Recurrent states are float32 (`mamba_ssm_dtype` of the released checkpoints)."""
_UNEQUAL_LAYERS = 1.5
"""vLLM pads the smaller kind of layers if there are fewer than this many layers of the other kind per layer."""


def layer_state_bytes(linear: LinearAttentionShape, dtype_bytes: int) -> int:
    """Return the bytes of a sequence's state in one layer: inputs of the convolution, and the recurrent state."""
    convolution = dtype_bytes * linear.conv_dim * (linear.conv_kernel - 1)
    return convolution + _STATE_ELEMENT_BYTES * linear.state_elements


@dataclass(frozen=True, slots=True)
class KvCacheLayout:
    """Blocks of the KV cache on one GPU.

    Attributes:
        block_tokens: Tokens per block.
        block_bytes: Bytes of a block, of all layers of a group.
        token_groups: Groups of layers with full attention, each with blocks for all tokens.
        state_groups: Groups of layers with linear attention.
    """

    block_tokens: int
    block_bytes: int
    token_groups: int = 1
    state_groups: int = 0

    @classmethod
    def of(cls, text: TextShape, dtype_bytes: int, tensor_parallel_size: int) -> KvCacheLayout:
        """Return the layout of a model; each GPU holds at least one head."""
        kv_heads = max(1, text.kv_heads // tensor_parallel_size)
        token_bytes = 2 * dtype_bytes * kv_heads * text.head_dim
        linear = text.linear
        if linear is None:
            return cls(KERNEL_BLOCK_TOKENS, KERNEL_BLOCK_TOKENS * token_bytes * text.layers)
        fewer, more = sorted((text.attention_layers, linear.layers))
        layers = more if more < _UNEQUAL_LAYERS * fewer else fewer
        state = layer_state_bytes(linear, dtype_bytes) // tensor_parallel_size
        block_tokens = KERNEL_BLOCK_TOKENS * -(-state // (KERNEL_BLOCK_TOKENS * token_bytes))
        return cls(
            block_tokens,
            block_tokens * token_bytes * layers,
            token_groups=-(-text.attention_layers // layers),
            state_groups=-(-linear.layers // layers),
        )

    @property
    def state_blocks(self) -> int:
        """Blocks that a sequence takes for its states, whatever its length."""
        return STATES_PER_SEQUENCE * self.state_groups

    def blocks(self, tokens: int) -> int:
        """Return the blocks of a sequence without its states."""
        return self.token_groups * -(-tokens // self.block_tokens)

    def sequence_blocks(self, tokens: int) -> int:
        """Return the blocks of a sequence."""
        return self.blocks(tokens) + self.state_blocks

    def tokens(self, blocks: int) -> int:
        """Return the tokens in the place of these blocks."""
        return blocks // self.token_groups * self.block_tokens

    def shared_sequences(self, blocks: int, tokens: int, prefix_tokens: int, group_size: int) -> int:
        """Return the sequences that fit if each group stores its prefix once; the last group may be partial."""
        shared = prefix_tokens // self.block_tokens * self.block_tokens
        prefix, branch = self.blocks(shared), self.sequence_blocks(tokens - shared)
        groups, free_blocks = divmod(blocks, prefix + group_size * branch)
        return group_size * groups + max(0, min(group_size, (free_blocks - prefix) // branch))
