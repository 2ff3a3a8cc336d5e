"""Activations and workspaces of a rank's largest micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig
from vz_ray.families import ModelShape, TextShape
from vz_ray.planning import activation_memory
from vz_ray.planning.activation_memory import FP32_BYTES, AttentionMemory
from vz_ray.planning.gpu_memory import Certainty, MemoryItem, MemoryPhase
from vz_ray.planning.layer_workspace import block_workspace_bytes, layer_workspace_bytes
from vz_ray.planning.trainable_params import TrainableParams

ATTENTION_SCORE_COPIES = 4
"""Float32 score matrices (queries x keys) of attention on GPUs without FlashAttention."""


@dataclass(frozen=True, slots=True)
class WorstCaseBatch:
    """A rank's part of the largest micro-batch, which is one packed sequence.

    Attributes:
        tokens: Tokens of the sequence.
        patches: Patches of its distinct frames.
        sampled_tokens: Tokens with computed log-probs.
        attention_pairs: Query-key pairs of the largest block of attention.
        gathered_keys: Keys per token, including the prefix keys that each branch gathers.
    """

    tokens: int
    patches: int
    sampled_tokens: int
    attention_pairs: int
    gathered_keys: float


def gpu_attention(text: TextShape, learner: LearnerConfig, batch: WorstCaseBatch, dtype_bytes: int) -> AttentionMemory:
    """Return the attention of the learner on GPUs: FlashAttention in half precision."""
    ranks = learner.sequence_parallel_size
    fused = dtype_bytes < FP32_BYTES
    return AttentionMemory(
        fused=fused,
        # With fewer key heads than ranks, several ranks hold the same head.
        gathered_keys=batch.gathered_keys * max(1.0, ranks / text.kv_heads),
        exchanged=ranks > 1,
        score_bytes=0 if fused else ATTENTION_SCORE_COPIES * FP32_BYTES * text.heads * batch.attention_pairs,
    )


def activation_items(
    shape: ModelShape,
    learner: LearnerConfig,
    params: TrainableParams,
    batch: WorstCaseBatch,
    dtype_bytes: int,
    attention: AttentionMemory | None = None,
) -> list[MemoryItem]:
    """Return activations and workspaces. A partly trained vision tower counts as fully trained.

    Args:
        attention: Default: `gpu_attention`.
    """
    text, vision, checkpointing = shape.text, shape.vision, learner.gradient_checkpointing
    attention = attention or gpu_attention(text, learner, batch, dtype_bytes)
    saved = activation_memory.text_saved_bytes(
        text,
        dtype_bytes,
        batch.tokens,
        checkpointing=checkpointing,
        attention=attention,
        tile_tokens=learner.mlp_tile_tokens,
    )
    saved += activation_memory.head_saved_bytes(text, dtype_bytes, batch.sampled_tokens)
    pixels = activation_memory.pixel_input_bytes(vision, batch.patches)
    tower = 0
    pass_patches = min(batch.patches, learner.vision_slice_patches or batch.patches)
    sliced = params.vision and pass_patches < batch.patches
    if sliced:
        tower = activation_memory.feature_bytes(vision, dtype_bytes, batch.patches)
        tower += checkpointing * activation_memory.slice_table_bytes(vision, batch.patches)
    elif params.vision:
        tower = activation_memory.vision_saved_bytes(vision, dtype_bytes, batch.patches, checkpointing=checkpointing)
    layer = layer_workspace_bytes(
        text,
        dtype_bytes,
        batch.tokens,
        checkpointing=checkpointing,
        attention=attention,
        tile_tokens=learner.mlp_tile_tokens,
        mlp_trained=not learner.lora.rank,
    )
    layer += attention.score_bytes
    dropout = batch.tokens * (dtype_bytes + 1) * params.dropout_inputs
    if checkpointing:
        layer += dropout // text.layers
    else:
        saved += dropout
    logits = activation_memory.logits_workspace_bytes(
        text,
        dtype_bytes,
        batch.sampled_tokens,
        learner.logprob_chunk_tokens,
        head_trained=not learner.lora.rank,
    )
    if not params.vision:
        layer = max(layer, activation_memory.frozen_tower_bytes(vision, dtype_bytes, pass_patches))
    else:
        in_block = block_workspace_bytes(vision, dtype_bytes, pass_patches, checkpointing=checkpointing)
        if sliced:
            in_block += activation_memory.vision_saved_bytes(
                vision, dtype_bytes, pass_patches, checkpointing=checkpointing
            )
        # The language model's activations are free before the backward pass of the tower.
        layer = max(layer, in_block - saved)
    return [
        _temporary("activations, language model", saved),
        _temporary("activations, vision tower", tower + pixels),
        # The logits' backward pass ends before the layers' backward pass starts.
        _temporary("logits workspace" if logits >= layer else "layer workspace", max(logits, layer)),
    ]


def _temporary(name: str, size: int) -> MemoryItem:
    return MemoryItem(name, size, Certainty.ESTIMATE, MemoryPhase.FORWARD_BACKWARD)
