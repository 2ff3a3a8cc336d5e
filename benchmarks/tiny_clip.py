"""Tiny CLIP model for needle videos, which matches frames with questions.

The checkpoint directory is complete (config, weights, processor, tokenizer) and has about 200,000
parameters. Training takes one to two minutes on rendered needle frames; a seed fixes the frames and the
initial weights.

    python -m benchmarks.tiny_clip clip/
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from vz_ray.env.frame_selectors import strip_options
from vz_ray.needle import NeedleVideo, QuestionKind, make_video, render_frames
from vz_ray.needle.needle_video import BORDERS, format_question

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, LAYERS, PROJECTION_DIM = 56, 8, 64, 2, 32
KINDS = (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, QuestionKind.DEEP)
QUESTIONS = tuple(dict.fromkeys(strip_options(format_question(kind, border)) for kind in KINDS for border in BORDERS))
"""All needle questions, without their answer options."""
BATCH_SIZE, STEPS, LEARNING_RATE = 64, 700, 2e-3


def build_clip(directory: Path, seed: int = 0) -> Any:
    """Save a CLIP with random weights and its processor to `directory`; return the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = _build_tokenizer()
    tower = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "projection_dim": PROJECTION_DIM,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        projection_dim=PROJECTION_DIM,
    )
    torch.manual_seed(seed)
    model: Any = CLIPModel(config)
    model.save_pretrained(directory)
    crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop_size)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(directory)
    return model


def train_clip(directory: Path, *, seed: int = 0, steps: int = STEPS) -> float:
    """Build and train the model in `directory`; return the mean loss of the last 50 steps.

    The loss is SigLIP's pairwise sigmoid loss (arXiv 2303.15343) over all pairs of an image and a question,
    because several questions can match the same image.
    """
    from transformers import AutoProcessor

    model = build_clip(directory, seed)
    processor = AutoProcessor.from_pretrained(directory)
    max_length = model.config.text_config.max_position_embeddings
    texts = processor(text=list(QUESTIONS), padding="max_length", max_length=max_length, return_tensors="pt")
    bias = torch.nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    rng, losses = random.Random(seed), []
    for _ in range(steps):
        images, labels = _render_batch(rng)
        pixels = processor(images=images, return_tensors="pt")
        image_features = _normalize(model.get_image_features(**pixels))
        text_features = _normalize(model.get_text_features(**texts))
        logits = image_features @ text_features.T * model.logit_scale.exp() + bias
        signs = torch.from_numpy(2.0 * labels - 1.0)
        loss = -logsigmoid(signs * logits).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(directory)
    return float(np.mean(losses[-50:]))


def _render_batch(rng: random.Random) -> tuple[list[np.ndarray], np.ndarray]:
    """Render frames of one video, about half of them evidence; return them and labels `[frames, questions]`."""
    shot_s = rng.choice((4, 8, 16, 32))
    video = make_video(rng.randrange(2**31), shot_s * 16.0, KINDS)
    times_s = [rng.uniform(0, video.duration_s) for _ in range(BATCH_SIZE // 4)]
    for spans, count in ((video.flashes, BATCH_SIZE // 2), (video.borders, BATCH_SIZE // 4)):
        times_s += [rng.uniform(span.start_s, span.end_s) for span in rng.choices(spans, k=count)]
    frames = render_frames(video, times_s, 112)
    labels = [[_is_evidence(video, time_s, question) for question in QUESTIONS] for time_s in times_s]
    return list(frames), np.array(labels, np.float32)


def _is_evidence(video: NeedleVideo, time_s: float, question: str) -> bool:
    """Check that a flash is visible at this time together with the border that the question names."""
    border = next((span.name for span in video.borders if span.covers(time_s)), "none")
    night = any(span.covers(time_s) for span in video.nights)
    flash = any(span.covers(time_s) for span in video.flashes)
    return flash and f"the {border} border" in question and night == ("night" in question)


def _normalize(features: Any) -> torch.Tensor:
    # Newer versions of transformers return an output object instead of the tensor.
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


def _build_tokenizer() -> Any:
    """Build a tokenizer with one token per word of the questions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in QUESTIONS for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<unknown>", *words, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(name, vocabulary[name]) for name in ("<start>", "<end>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads slow down a model of this size
    started = time.monotonic()
    loss = train_clip(args.directory, seed=args.seed, steps=args.steps)
    print(f"loss {loss:.4f} after {args.steps} steps, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
