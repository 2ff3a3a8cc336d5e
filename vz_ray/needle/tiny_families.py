"""Tiny models of each family: config, processor and initialization. The architectures are the real ones.

A frame of one visual token has `TinyFamily.frame_side` pixels per side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vz_ray.utils.errors import UserError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

ROPE_THETA = 10_000.0
MERGE_SIZE = 2


@dataclass(frozen=True, slots=True)
class TinyModelConfig:
    """Sizes of a tiny model; the defaults give 1.2 M to 2.5 M parameters, by family."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    num_kv_heads: int = 2
    intermediate_size: int = 384
    vision_hidden_size: int = 64
    num_vision_layers: int = 2
    max_context: int = 4096
    vocab_size: int = 1792
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class TinyFamily(ABC):
    """What differs between the tiny models of the families."""

    name: ClassVar[str]
    """HF model type."""
    title: ClassVar[str]
    hf_prefix: ClassVar[str]
    """Prefix of the HF class names."""
    patch_size: ClassVar[int]
    starts_from_base: ClassVar[bool] = False
    """Whether the base starts from the text weights of the Qwen2.5-VL base."""
    base_steps: ClassVar[int] = 3600
    """Optimizer steps of the base's training."""
    base_sizes: ClassVar[TinyModelConfig] = TinyModelConfig()
    """Sizes of the quickstart's base."""
    engine_dtype: ClassVar[str] = "float32"
    """Dtype that vLLM's CPU kernels accept."""
    tokenizer_fields: ClassVar[dict[str, Any]] = {}
    """Attributes that the family's processor reads from the tokenizer."""

    @property
    def frame_side(self) -> int:
        """Side of a frame of one visual token in pixels."""
        return self.patch_size * MERGE_SIZE

    def hf_config(self, tokenizer: Any, config: TinyModelConfig) -> Any:
        """Return the HF config of these sizes, with the token ids of `tokenizer`."""
        import transformers

        from vz_ray.needle.lookup_init import INIT_STD

        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
        text_config = {
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "max_position_embeddings": config.max_context,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": config.tie_word_embeddings,
            **self._text_fields(config),
        }
        vision_config = {
            "depth": config.num_vision_layers,
            "hidden_size": config.vision_hidden_size,
            "out_hidden_size": config.hidden_size,
            "intermediate_size": 2 * config.vision_hidden_size,
            "num_heads": 2,
            **self._vision_fields(config),
        }
        hf_config = getattr(transformers, f"{self.hf_prefix}Config")(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=config.tie_word_embeddings,
        )
        for part in (hf_config, hf_config.text_config, hf_config.vision_config):
            part.initializer_range = INIT_STD
        return hf_config

    def build(self, hf_config: Any) -> Any:
        """Return the HF model with initial weights, a function of torch's seed."""
        import torch
        import transformers

        model = getattr(transformers, f"{self.hf_prefix}ForConditionalGeneration")(hf_config)
        with torch.no_grad():
            self._initialize(model)
        return model

    def start_from(self, model: Any, checkpoint: Path) -> None:
        """Copy the text weights of a trained Qwen2.5-VL checkpoint to a new model.

        Raises:
            UserError: The family starts from random weights, or the sizes differ.
        """
        raise UserError(f"the {self.title} base starts from random weights; leave out {checkpoint}")

    @abstractmethod
    def processor(self, tokenizer: Any) -> Any:
        """Return the HF processor."""

    @abstractmethod
    def vision_projections(self, model: Any) -> list[Any]:
        """Return the projections from the vision tower to the text model; the first gives the frame embeddings."""

    @abstractmethod
    def _text_fields(self, config: TinyModelConfig) -> dict[str, Any]: ...

    @abstractmethod
    def _vision_fields(self, config: TinyModelConfig) -> dict[str, Any]: ...

    @abstractmethod
    def _initialize(self, model: Any) -> None: ...


class TinyQwen2_5VL(TinyFamily):
    """Attention has biases, which make the score of an earlier position independent of the tokens."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    hf_prefix = "Qwen2_5_VL"
    patch_size = 14

    def processor(self, tokenizer: Any) -> Any:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

        bounds = {"shortest_edge": self.frame_side**2, "longest_edge": 100_352}
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=bounds),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(size=bounds),
            chat_template=tokenizer.chat_template,
        )

    def vision_projections(self, model: Any) -> list[Any]:
        return [model.model.visual.merger.mlp[-1]]

    def _text_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        half, quarter = config.head_dim // 2, config.head_dim // 8
        spatial = half - quarter
        section = [quarter, spatial - spatial // 2, spatial // 2]
        return {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": section}}

    def _vision_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        return {"window_size": 112, "fullatt_block_indexes": [config.num_vision_layers - 1]}

    def _initialize(self, model: Any) -> None:
        from vz_ray.needle import lookup_init as init

        init.initialize_embeddings(model)
        self.vision_projections(model)[0].weight.mul_(init.FRAME_SCALE)
        layers = model.model.language_model.layers
        for layer in layers:
            attention = layer.self_attn
            query = attention.q_proj.weight.view(-1, attention.head_dim, attention.q_proj.in_features)
            init.initialize_attention(attention, query, init.MATCH_SCALE)
            layer.mlp.down_proj.weight.mul_(0.1)
        first = layers[0].self_attn
        size = first.head_dim
        query, key = init.earlier_token_vectors(size, size, ROPE_THETA, distance=2)
        first.q_proj.weight[:size] = 0
        first.k_proj.weight[:size] = 0
        first.q_proj.bias[:size] = query
        first.k_proj.bias[:size] = key
        first.o_proj.weight[:, :size] *= 2


class TinyQwen3VL(TinyFamily):
    """Queries and keys are normalized and have no biases; a constant channel takes the place of the biases."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    hf_prefix = "Qwen3VL"
    patch_size = 16
    tokenizer_fields: ClassVar[dict[str, Any]] = {
        "extra_special_tokens": {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }
    }
    starts_from_base = True
    base_steps = 400
    norm_offset: ClassVar[float] = 0.0
    """Constant that the RMS norms of the text model add to their weights."""
    rotary_share: ClassVar[float] = 1.0
    """Share of a head's channels with rotary positions."""
    output_scale: ClassVar[float] = 1.0
    """Factor of the output projections that compensates an output gate of one half."""

    def processor(self, tokenizer: Any) -> Any:
        from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        options = {
            "size": {"shortest_edge": self.frame_side**2, "longest_edge": 131_072},
            "patch_size": self.patch_size,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(**options),
            chat_template=tokenizer.chat_template,
        )

    def vision_projections(self, model: Any) -> list[Any]:
        visual = model.model.visual
        return [visual.merger.linear_fc2, *(merger.linear_fc2 for merger in self._deepstack_mergers(visual))]

    def start_from(self, model: Any, checkpoint: Path) -> None:
        from vz_ray.needle.warm_start import copy_text_weights

        copy_text_weights(self, model, checkpoint)

    def query_rows(self, attention: Any) -> Any:
        """Return a view of the weights that compute queries, `[heads, head_dim, hidden]`."""
        weight = attention.q_proj.weight
        return weight.view(-1, attention.head_dim, weight.shape[1])

    def rotary_dim(self, config: TinyModelConfig) -> int:
        """Return the channels of a head with rotary positions."""
        return int(self.rotary_share * config.head_dim)

    def _deepstack_mergers(self, visual: Any) -> list[Any]:
        return list(visual.deepstack_merger_list)

    def _text_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        third = self.rotary_dim(config) // 2 // 3
        rope = {
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "mrope_interleaved": True,
            "mrope_section": [self.rotary_dim(config) // 2 - 2 * third, third, third],
        }
        return {"head_dim": config.head_dim, "rope_parameters": rope}

    def _vision_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        levels = min(config.num_vision_layers, config.num_layers, 2)
        return {
            "patch_size": self.patch_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(levels)),
        }

    def _initialize(self, model: Any) -> None:
        from vz_ray.needle import lookup_init as init

        projection, *deepstack = self.vision_projections(model)
        projection.weight.mul_(init.FRAME_SCALE)
        for level in deepstack:
            level.weight.mul_(init.DEEPSTACK_SCALE)
        init.initialize_embeddings(model, self.norm_offset)
        for layer in model.model.language_model.layers:
            self._mlp_outputs(layer).mul_(0.1)
            self._initialize_token_mixer(layer)
        init.reserve_constant_channel(model, projection, self.norm_offset)
        first = attention_layers(model)[0]
        config = model.config.text_config
        rotary_dim = int(self.rotary_share * config.head_dim)
        vectors = init.earlier_token_vectors(config.head_dim, rotary_dim, ROPE_THETA, distance=2)
        for rows, vector in zip(
            (self.query_rows(first)[0], first.k_proj.weight[: first.head_dim]), vectors, strict=True
        ):
            rows.zero_()
            rows[:, 0] = vector
        for norm in (first.q_norm, first.k_norm):
            norm.weight.fill_(init.EARLIER_SCALE - self.norm_offset)
        first.o_proj.weight[:, : first.head_dim] *= 2

    def _mlp_outputs(self, layer: Any) -> Any:
        """Return the weights that compute a layer's MLP outputs."""
        return layer.mlp.down_proj.weight

    def _initialize_token_mixer(self, layer: Any) -> None:
        from vz_ray.needle import lookup_init as init

        attention = layer.self_attn
        init.initialize_attention(attention, self.query_rows(attention), 1.0, self.output_scale)
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(init.MATCH_SCALE - self.norm_offset)


class TinyQwen3VLMoe(TinyQwen3VL):
    """Every layer but the second has eight experts, of which a token takes two."""

    name = "qwen3_vl_moe"
    title = "Qwen3-VL-MoE"
    hf_prefix = "Qwen3VLMoe"
    starts_from_base = False
    base_steps = 3600

    def _mlp_outputs(self, layer: Any) -> Any:
        return layer.mlp.experts.down_proj if hasattr(layer.mlp, "experts") else super()._mlp_outputs(layer)

    def _text_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        return super()._text_fields(config) | {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 3 * config.hidden_size // 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        }


class TinyQwen3_5(TinyQwen3VL):
    """The second of every three layers has linear attention, with the head size that vLLM's CPU kernel accepts.

    Full attention has an output gate, which starts at one half, and rotary positions in a quarter of the
    channels. The norms of the text model add 1 to their weights.
    """

    name = "qwen3_5"
    title = "Qwen3.5"
    hf_prefix = "Qwen3_5"
    engine_dtype = "bfloat16"
    base_sizes = TinyModelConfig(num_layers=6)
    base_steps = 1400
    norm_offset = 1.0
    rotary_share = 0.25
    output_scale = 2.0

    def query_rows(self, attention: Any) -> Any:
        weight = attention.q_proj.weight
        return weight.view(-1, 2, attention.head_dim, weight.shape[1])[:, 0]

    def _deepstack_mergers(self, visual: Any) -> list[Any]:
        return []

    def _text_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        fields = super()._text_fields(config)
        fields["rope_parameters"]["partial_rotary_factor"] = self.rotary_share
        layers = range(config.num_layers)
        return {
            **fields,
            "layer_types": ["linear_attention" if layer % 3 == 1 else "full_attention" for layer in layers],
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }

    def _vision_fields(self, config: TinyModelConfig) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "num_position_embeddings": 64}

    def _initialize_token_mixer(self, layer: Any) -> None:
        if not hasattr(layer, "self_attn"):
            layer.linear_attn.out_proj.weight.mul_(0.1)
            return
        super()._initialize_token_mixer(layer)
        attention = layer.self_attn
        weight = attention.q_proj.weight
        weight.view(-1, 2, attention.head_dim, weight.shape[1])[:, 1] = 0


def attention_layers(model: Any) -> list[Any]:
    """Return the full-attention modules of an HF model's text layers."""
    return [layer.self_attn for layer in model.model.language_model.layers if hasattr(layer, "self_attn")]


TINY_FAMILIES: dict[str, TinyFamily] = {
    family.name: family for family in (TinyQwen2_5VL(), TinyQwen3VL(), TinyQwen3VLMoe(), TinyQwen3_5())
}


def find_tiny_family(name: str) -> TinyFamily:
    """Return the family with this HF model type.

    Raises:
        UserError: The name is unknown.
    """
    if name not in TINY_FAMILIES:
        raise UserError(f"family is {name!r}; use one of {', '.join(TINY_FAMILIES)}")
    return TINY_FAMILIES[name]
