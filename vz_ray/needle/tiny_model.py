"""Tiny models of the supported families, as normal checkpoint directories.

The architecture and the processor are those of the large models; only the sizes and the tokenizer differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vz_ray.needle.tiny_families import SPECIAL_TOKENS, TinyModelConfig, find_tiny_family
from vz_ray.utils.errors import UserError

# Numbers of up to three digits, and fractions of two, are single tokens, so that copying a timestamp into a
# zoom call means copying two tokens.
_PIECES = r"</?[a-z_]+>|<frame|_time|s>|\.\d\d(?!\d)|\d{1,3}| ?[A-Za-z]+|\s+| ?[^\sA-Za-z0-9<]+|<"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _corpus(texts: Iterable[str]) -> Iterator[str]:
    for number in range(1000):
        yield from [f"{number}"] * 3
    for fraction in range(100):
        yield from [f"0.{fraction:02d}"] * 3
    for text in texts:
        yield from [text] * 3


def build_tokenizer(texts: Iterable[str], vocab_size: int, fields: Mapping[str, Any] | None = None) -> Any:
    """Train a byte-level BPE on `texts`; return a fast Hugging Face tokenizer.

    Args:
        texts: Training texts.
        vocab_size: Maximum size of the vocabulary.
        fields: Additional arguments of the tokenizer class.
    """
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
        **(fields or {}),
    )


def build_tiny_model(
    directory: Path | str,
    texts: Iterable[str],
    *,
    seed: int = 0,
    config: TinyModelConfig | None = None,
    family: str = "qwen2_5_vl",
    start: Path | None = None,
) -> Path:
    """Write a randomly initialized tiny model, tokenizer and processor to `directory`.

    Args:
        directory: Checkpoint directory.
        texts: Sample prompts, turns and frame labels to train the tokenizer on.
        seed: Seed of the weights.
        config: Sizes of the model.
        family: HF model type of the family.
        start: Trained Qwen2.5-VL checkpoint whose text weights are copied, see `TinyFamily.start_from`.

    Raises:
        UserError: The family is unknown, or `start` has another tokenizer or other sizes.
    """
    import torch

    tiny = find_tiny_family(family)
    config = config or TinyModelConfig()
    tokenizer = build_tokenizer(texts, config.vocab_size, tiny.tokenizer_fields)
    torch.manual_seed(seed)
    model = tiny.build(tiny.hf_config(tokenizer, config))
    if start is not None:
        _check_vocabulary(start, tokenizer)
        tiny.start_from(model, start)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory = Path(directory)
    save_hf_model(model, directory)
    tiny.processor(tokenizer).save_pretrained(directory)
    return directory


def save_hf_model(model: Any, directory: Path | str) -> None:
    """Write weights and config of a whole HF model, in the layout of released checkpoints that vLLM loads.

    transformers' own format keeps the experts of Qwen3-VL as they are in memory.
    """
    from vz_ray.weight_sync.weight_source import StoredLayout

    layout, weights = StoredLayout(model), model.state_dict()
    if not any(map(layout.is_transposed, weights)):
        model.save_pretrained(directory)
        return
    stored = {name: layout.tensor(name, tensor) for name, tensor in weights.items()}
    model.save_pretrained(directory, state_dict=stored, save_original_format=False)


def _check_vocabulary(checkpoint: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(checkpoint).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{checkpoint} has another vocabulary than the new model; train it again with `vz-ray base`")
