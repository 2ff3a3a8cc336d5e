"""A tiny CLIP that knows the needle world: which frames show what a question asks about.

A real CLIP checkpoint directory (config, weights, processor, tokenizer) of some
200,000 parameters, trained in a minute or two on pictures drawn on the spot;
the same seed gives the same pictures and the same first weights.

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

SIDE, PATCH, WIDTH, LAYERS, SPACE = 56, 8, 64, 2, 32
"""Pixels of a side, of a patch's side; width of both towers, their layers, features of a picture or text."""
KINDS = (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, QuestionKind.DEEP)
QUESTIONS = tuple(
    dict.fromkeys(strip_options(format_question(kind, border)) for kind in KINDS for border in BORDERS)
)
"""Every question that can be asked, without options."""
PICTURES, STEPS, RATE = 64, 700, 2e-3


def build_clip(directory: Path, seed: int = 0) -> Any:
    """Writes a CLIP with random weights, and its processor; returns the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = _tokenizer()
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": 2, "projection_dim": SPACE}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=SPACE,
    )
    torch.manual_seed(seed)
    model: Any = CLIPModel(config)
    model.save_pretrained(directory)
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    CLIPProcessor(pictures, tokenizer).save_pretrained(directory)
    return model


def train_clip(directory: Path, *, seed: int = 0, steps: int = STEPS) -> float:
    """Trains the model of `build` where it lies; returns the last loss, a mean over 50 steps.

    Pairwise sigmoid loss (SigLIP, arXiv 2303.15343): of every picture and every question, whether
    the one is what the other asks about. Several questions ask about the same picture.
    """
    from transformers import AutoProcessor

    model = build_clip(directory, seed)
    processor = AutoProcessor.from_pretrained(directory)
    longest = model.config.text_config.max_position_embeddings
    texts = processor(text=list(QUESTIONS), padding="max_length", max_length=longest, return_tensors="pt")
    bias = torch.nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    draw, losses = random.Random(seed), []
    for _ in range(steps):
        pictures, labels = _batch(draw)
        pixels = processor(images=list(pictures), return_tensors="pt")
        image = _unit(model.get_image_features(**pixels))
        text = _unit(model.get_text_features(**texts))
        logits = image @ text.T * model.logit_scale.exp() + bias
        signs = torch.from_numpy(2.0 * labels - 1.0)
        loss = -logsigmoid(signs * logits).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(directory)
    return float(np.mean(losses[-50:]))


def _batch(draw: random.Random) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures of one video, about half of them evidence, and `[pictures, questions]` which answers which."""
    shot_s = draw.choice((4, 8, 16, 32))
    video = make_video(draw.randrange(2**31), shot_s * 16.0, KINDS)
    times = [draw.uniform(0, video.duration_s) for _ in range(PICTURES // 4)]
    for spans in (video.flashes, video.borders):
        for span in draw.choices(spans, k=PICTURES // 4 if spans is video.borders else PICTURES // 2):
            times.append(draw.uniform(span.start_s, span.end_s))
    pictures = render_frames(video, times, 112)
    labels = np.array([[_answers(video, time_s, text) for text in QUESTIONS] for time_s in times], np.float32)
    return list(pictures), labels


def _answers(video: NeedleVideo, time_s: float, question: str) -> bool:
    """Whether something flashes at this time while the border that is asked about is shown."""
    border = next((span.name for span in video.borders if span.covers(time_s)), "none")
    night = any(span.covers(time_s) for span in video.nights)
    flash = any(span.covers(time_s) for span in video.flashes)
    return flash and f"the {border} border" in question and night == ("night" in question)


def _unit(found: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)


def _tokenizer() -> Any:
    """One token per word of the questions."""
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
    given = parser.parse_args()
    torch.set_num_threads(1)  # so small that more are slower
    began = time.monotonic()
    loss = train_clip(given.directory, seed=given.seed, steps=given.steps)
    print(f"loss {loss:.4f} after {given.steps} steps, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
