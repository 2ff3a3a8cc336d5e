"""Qwen3-VL with experts: Qwen3-VL whose MLPs are sets of experts, of which a router selects some per token.

transformers and vLLM route alike: softmax over the logits of all experts, the largest of them, divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from vz_ray.families.family import read_text
from vz_ray.families.qwen3_vl import LARGE_TOWER, Qwen3VL
from vz_ray.families.shape import ExpertsShape, ModelShape, TextShape

_MODEL_TYPE = "qwen3_vl_moe"


def _released(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, experts: tuple[int, int, int]
) -> ModelShape:
    """Return a released checkpoint's shape; `experts` are their number, those of a token and their size."""
    text = TextShape(
        hidden, layers, heads, kv_heads, 128, intermediate, 151_936, tie_word_embeddings=False, qk_norm=True,
        experts=ExpertsShape(tuple(range(layers)), *experts),
    )  # fmt: skip
    return ModelShape(_MODEL_TYPE, text, replace(LARGE_TOWER, out_hidden=hidden, deepstack_blocks=(8, 16, 24)))


class Qwen3VLMoe(Qwen3VL):
    name = "Qwen3-VL-MoE"
    model_type = _MODEL_TYPE
    known_shapes: ClassVar[Mapping[str, ModelShape]] = {
        "Qwen3-VL-30B-A3B": _released(2048, 48, 32, 4, 6144, (128, 8, 768)),
    }

    def check_config(self, config: Any) -> None:
        """Check that transformers and vLLM compute the same; see `ModelFamily.check_config`."""
        super().check_config(config)
        text = config.get_text_config()
        if getattr(text, "norm_topk_prob", None) is not True:
            # transformers always divides by the sum, vLLM as this field says.
            raise self.unsupported("text_config.norm_topk_prob", getattr(text, "norm_topk_prob", "missing"), "true")
        if text.attention_bias:
            raise self.unsupported("text_config.attention_bias", "true", "false")
        if size := getattr(text, "shared_expert_intermediate_size", 0):
            raise self.unsupported("text_config.shared_expert_intermediate_size", size, "0")
        if not _expert_layers(text):
            raise self.unsupported(
                "text_config.mlp_only_layers", "all layers", "at least one layer with experts; use model_type qwen3_vl"
            )
        if text.hidden_size in (text.moe_intermediate_size, 2 * text.moe_intermediate_size):
            raise self.unsupported(
                "text_config.moe_intermediate_size",
                text.moe_intermediate_size,
                f"sizes other than hidden_size {text.hidden_size} and its half, with which transformers does not "
                "recognize that checkpoints hold transposed experts",
            )

    def read_text_shape(self, config: Any) -> TextShape:
        text = config.get_text_config()
        experts = ExpertsShape(
            indices=_expert_layers(text),
            count=text.num_experts,
            per_token=text.num_experts_per_tok,
            intermediate=text.moe_intermediate_size,
        )
        return read_text(config, qk_norm=True, experts=experts)

    def is_stored_transposed(self, parameter: str) -> bool:
        return parameter.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"))


def _expert_layers(text: Any) -> tuple[int, ...]:
    """Return the indices of the layers with experts, as transformers and vLLM read them from the config."""
    step, excluded = text.decoder_sparse_step, text.mlp_only_layers or ()
    return tuple(layer for layer in range(text.num_hidden_layers) if layer not in excluded and (layer + 1) % step == 0)
