"""Tiny Qwen2.5-VL with about 1.3 M parameters, as a normal checkpoint directory.

The architecture, processor and chat template are those of the 7B model; only the sizes and the tokenizer
differ. A 28 x 28 frame is one visual token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# Numbers of up to three digits, and fractions of two, are single tokens, so that copying a timestamp into a
# zoom call means copying two tokens.
_PIECES = r"</?[a-z_]+>|<frame|_time|s>|\.\d\d(?!\d)|\d{1,3}| ?[A-Za-z]+|\s+| ?[^\sA-Za-z0-9<]+|<"

ROPE_THETA = 10_000.0

INIT_STD = 0.07
"""About 1 / sqrt(hidden_size). The usual 0.02 suits widths in the thousands and trains slowly here."""

EMBEDDING_STD = 0.5
"""Large enough to keep token identities distinguishable after the layers' updates."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyModelConfig:
    """Sizes of the tiny model; the defaults give about 1.3 M parameters."""

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


def _corpus(texts: Iterable[str]) -> Iterator[str]:
    for number in range(1000):
        yield from [f"{number}"] * 3
    for fraction in range(100):
        yield from [f"0.{fraction:02d}"] * 3
    for text in texts:
        yield from [text] * 3


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE on `texts`; return a fast Hugging Face tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
    )


def make_hf_config(tokenizer: Any, shape: TinyModelConfig) -> Any:
    """The `Qwen2_5_VLConfig` of `shape`, with the token ids of `tokenizer`."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head = shape.hidden_size // shape.num_heads
    quarter = head // 8
    rope = {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": [
            quarter,
            head // 2 - quarter - (head // 2 - quarter) // 2,
            (head // 2 - quarter) // 2,
        ],
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "max_position_embeddings": shape.max_context,
            "rope_parameters": rope,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": shape.tie_word_embeddings,
        },
        vision_config={
            "depth": shape.num_vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "out_hidden_size": shape.hidden_size,
            "intermediate_size": 2 * shape.vision_hidden_size,
            "num_heads": 2,
            "window_size": 112,
            "fullatt_block_indexes": [shape.num_vision_layers - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = INIT_STD
    return config


def _initialize_lookup(model: Any) -> None:
    """Initialize `model` for fast learning of lookups: which frame shows an object, and what is its time.

    From random weights, lookups are not learned within thousands of steps. Here every head starts by
    attending to similar tokens and copying them (mimetic initialization, arXiv 2305.09828). One head of the
    first layer attends to the second previous token, which gives a time label information about its frame.
    """
    import torch

    text, merger = model.model.language_model, model.model.visual.merger
    with torch.no_grad():
        text.embed_tokens.weight.mul_(EMBEDDING_STD / INIT_STD)
        if model.config.tie_word_embeddings:
            text.norm.weight.fill_(INIT_STD / EMBEDDING_STD)
        # Frame embeddings start no larger than text embeddings.
        merger.mlp[-1].weight.mul_(0.12)
        for layer in text.layers:
            attention = layer.self_attn
            size, hidden = attention.k_proj.weight.shape
            kv_heads, group = size // attention.head_dim, attention.num_key_value_groups
            similarity, copy = (torch.linalg.qr(torch.randn(hidden, hidden))[0][:size] for _ in range(2))

            def per_head(matrix: Any, kv_heads: int = kv_heads, group: int = group) -> Any:
                heads = matrix.view(kv_heads, -1, matrix.shape[1])
                return heads.repeat_interleave(group, dim=0).flatten(0, 1)

            attention.k_proj.weight.copy_(0.6 * similarity)
            attention.q_proj.weight.copy_(0.6 * per_head(similarity))
            attention.v_proj.weight.copy_(copy)
            attention.o_proj.weight.copy_(0.25 / group * per_head(copy).T)
            layer.mlp.down_proj.weight.mul_(0.1)
        _attend_to_earlier_token(text.layers[0].self_attn, distance=2)


def _attend_to_earlier_token(attention: Any, distance: int) -> None:
    """Set the biases of the first head to attend to the token `distance` positions before."""
    import torch

    size = attention.head_dim
    half = size // 2
    angles = distance * ROPE_THETA ** (-torch.arange(half) / half)
    # Only the fastest quarter of the rotations separates neighboring positions.
    strength = 6**0.5 * (torch.arange(half) < half // 4)
    attention.q_proj.weight[:size] = 0
    attention.k_proj.weight[:size] = 0
    attention.q_proj.bias[:size] = torch.cat([strength * torch.cos(angles), -strength * torch.sin(angles)])
    attention.k_proj.bias[:size] = torch.cat([strength, torch.zeros(half)])
    attention.o_proj.weight[:, :size] *= 2


def build_tiny_model(
    directory: Path | str, texts: Iterable[str], *, seed: int = 0, config: TinyModelConfig | None = None
) -> Path:
    """Write a randomly initialized tiny model, tokenizer and processor to `directory`.

    Args:
        directory: Checkpoint directory.
        texts: Sample prompts, turns and frame labels to train the tokenizer on.
        seed: Seed of the weights.
        config: Sizes of the model.
    """
    import torch
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    config = config or TinyModelConfig()
    tokenizer = build_tokenizer(texts, config.vocab_size)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(make_hf_config(tokenizer, config))
    _initialize_lookup(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory = Path(directory)
    model.save_pretrained(directory)
    bounds = {"shortest_edge": 28 * 28, "longest_edge": 100_352}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=bounds),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=bounds),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return directory
