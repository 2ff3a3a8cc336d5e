"""Start of a tiny model from the trained base of another family with the same sizes and tokenizer.

Lookups take thousands of steps to learn. The text weights of a trained base contain them, and layers of equal
shape transfer: embeddings, MLPs, norms and attention matrices. Only the vision tower is trained from scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vz_ray.needle.lookup_init import reserve_constant_channel
from vz_ray.needle.tiny_families import TinyQwen3VL
from vz_ray.utils.errors import UserError


def copy_text_weights(family: TinyQwen3VL, model: Any, source: Path) -> None:
    """Copy the text weights of a Qwen2.5-VL checkpoint to a new model.

    The layers of `source` become the layers with full attention; those with linear attention start small. Biases
    become weights of the constant channel in the first layer, which needs them to attend to an earlier token, and
    are dropped elsewhere.

    Args:
        family: Family of the new model.
        model: HF model with the sizes of `source`, from `TinyFamily.build`.
        source: Checkpoint directory.

    Raises:
        UserError: The sizes differ.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    text, trained = model.model.language_model, base.model.language_model
    layers = [layer for layer in text.layers if hasattr(layer, "self_attn")]
    projection = family.vision_projections(model)[0]
    if len(layers) != len(trained.layers) or projection.weight.shape != base.model.visual.merger.mlp[-1].weight.shape:
        raise UserError(f"{source} has other sizes than the new {family.title} model")
    with torch.no_grad():
        text.embed_tokens.weight.copy_(trained.embed_tokens.weight)
        text.norm.weight.copy_(trained.norm.weight - family.norm_offset)
        projection.load_state_dict(base.model.visual.merger.mlp[-1].state_dict())
        for layer, trained_layer in zip(layers, trained.layers, strict=True):
            _copy_layer(family, layer, trained_layer)
        reserve_constant_channel(model, projection, family.norm_offset)
        constant = float(
            (text.embed_tokens.weight[:, 0] * text.embed_tokens.weight.square().mean(dim=1).rsqrt()).mean()
        )
        attention, biased = layers[0].self_attn, trained.layers[0].self_attn
        family.query_rows(attention)[:, :, 0] = biased.q_proj.bias.view(-1, attention.head_dim) / constant
        attention.k_proj.weight[:, 0] = biased.k_proj.bias / constant


def _copy_layer(family: TinyQwen3VL, layer: Any, trained: Any) -> None:
    """Copy a layer; the norms of queries and keys get the scale that these have in `trained`."""
    layer.mlp.load_state_dict(trained.mlp.state_dict())
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(layer, name).weight.copy_(getattr(trained, name).weight - family.norm_offset)
    attention, biased = layer.self_attn, trained.self_attn
    queries = family.query_rows(attention)
    queries.copy_(biased.q_proj.weight.view_as(queries))
    attention.k_proj.weight.copy_(biased.k_proj.weight)
    attention.v_proj.weight.copy_(biased.v_proj.weight)
    attention.o_proj.weight.copy_(biased.o_proj.weight * family.output_scale)
    for norm, projection in ((attention.q_norm, biased.q_proj), (attention.k_norm, biased.k_proj)):
        scale = (projection.weight * trained.input_layernorm.weight).square().sum(dim=1).mean().sqrt()
        norm.weight.fill_(float(scale) - family.norm_offset)
