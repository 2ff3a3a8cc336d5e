"""Trains the tiny model's base, which can name and answer but has never seen a zoom.

Plain supervised training on lessons that grow longer: first a few frames,
then overviews, then up to `longest` uniform frames.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vz_ray.coldstart.lessons import Lesson, make_lesson, naming_lesson, trajectory
from vz_ray.coldstart.oracle import zoom_text
from vz_ray.coldstart.tiny import build_tiny
from vz_ray.data.needle.world import SHOTS
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.observe.errors import UserError
from vz_ray.observe.progress import Progress

if TYPE_CHECKING:
    from vz_ray.learner.model import Policy

LOG_EVERY = 20
PROMPT = "conf/prompt/tiny-answer.yaml"


@dataclass(frozen=True, slots=True)
class BaseTraining:
    """How the base is trained.

    Attributes:
        steps: Optimizer steps.
        batch_tokens: Tokens in a step, about.
        learning_rate: Peak of the cosine.
        longest: Most frames in a lesson.
        seed: Makes weights and lessons.
    """

    steps: int = 4000
    batch_tokens: int = 4000
    learning_rate: float = 1.5e-3
    longest: int = 128
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at `step`: linear warm-up over 100 steps, constant, cosine over the second half."""
        half = max(0.0, 2 * step / self.steps - 1)
        return (
            self.learning_rate
            * min(1.0, (step + 1) / 100)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * half)) / 2)
        )

    def frames(self, step: int) -> int:
        """The most frames of a lesson at `step`; 0 stands for the naming lesson.

        First names, then a few frames in a row, then overviews, then up to `longest`.
        """
        done = step / self.steps
        if done < 0.12 or (done < 0.4 and step % 8 == 0):
            return 0
        most = next(n for until, n in ((0.22, 4), (0.32, 8), (0.65, 16), (2, 32)) if done < until)
        if done > 0.75 and step % 4 == 0:
            most = 64 if step % 8 else 128
        return min(most, self.longest)

    def lessons(self, step: int) -> list[Lesson]:
        """As many lessons as fit a step; a pure function of seed and step."""
        frames = self.frames(step)
        rng = random.Random(f"{self.seed}/{step}")
        if frames == 0:
            return [naming_lesson(rng) for _ in range(self.batch_tokens // 70)]
        count = max(4, self.batch_tokens // (220 + 12 * min(frames, 50)))
        return [make_lesson(rng, frames) for _ in range(count)]


def corpus(seed: int = 0) -> list[str]:
    """Samples of everything that is ever said in the needle world, for the tokenizer."""
    rng = random.Random(seed)
    lessons = [make_lesson(rng, SHOTS) for _ in range(80)] + [naming_lesson(rng) for _ in range(20)]
    said = [text for lesson in lessons for pair in lesson.exchanges for text in pair]
    said += [zoom_text("nothing, red border at 12.00", 12.0, 24.0, fps) for fps in (0.25, 0.5, 1.0, 2.0, 4.0)]
    said += [
        "<|im_start|>system\nAnswer from the frames. You may zoom.<|im_end|>\n<|im_start|>user\n",
        "<frame0_time12.00s><tool_response>Error: </tool_response> Answer now.<|im_start|>assistant\n",
        "night at 12.00. segment [12, 24] at fps 1 has more than 8 frames; fps up to 0.5 would fit",
        "segment is reversed; start must come before end. segment is outside the video of 64.00 seconds",
        "no zoom is left; answer from what you have seen. the call is not valid JSON; expected",
    ]
    return said


def make_base(directory: Path, training: BaseTraining, *, threads: int, wording: str = PROMPT) -> None:
    """Builds the tiny model and trains its base, with progress on the terminal.

    Raises:
        UserError: `directory` exists.
    """
    import torch
    from transformers import AutoTokenizer

    if directory.exists():
        raise UserError(f"{directory} exists; choose another directory or delete it")
    torch.set_num_threads(threads)
    build_tiny(directory, corpus(), seed=training.seed)
    wire = WireFormat(AutoTokenizer.from_pretrained(directory), Wording.load(wording))
    with Progress() as progress, progress.stage("base", training.steps) as stage:

        def log(step: int, values: Mapping[str, float]) -> None:
            stage.advance(LOG_EVERY)
            progress.show(values)

        train_base(directory, wire, training, log)


def train_base(
    directory: Path,
    wire: WireFormat,
    training: BaseTraining,
    log: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Trains the checkpoint in `directory` in place.

    Args:
        directory: A tiny checkpoint, as `build_tiny` writes it.
        wire: Wording and tokenizer.
        training: Steps and rates.
        log: Called every `LOG_EVERY` steps with the loss and the share of lessons
            repeated token for token, by most frames.
    """
    import torch

    from vz_ray.learner.model import Policy
    from vz_ray.learner.pixels import PixelSpec

    policy = Policy.load(directory)
    spec = PixelSpec.of_checkpoint(directory)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic()
    for step in range(training.steps):
        frames, lessons = training.frames(step), training.lessons(step)
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        loss, exact = _learn(policy, lessons, wire, spec)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen[f"loss/{frames}"].append(loss)
        seen[f"exact/{frames}"].append(exact)
        if step % LOG_EVERY == LOG_EVERY - 1:
            log(
                step + 1,
                {
                    "seconds": time.monotonic() - began,
                    **{k: sum(v) / len(v) for k, v in sorted(seen.items())},
                },
            )
            seen.clear()
        if step % 500 == 499:
            policy.hf.save_pretrained(directory)
    policy.hf.save_pretrained(directory)


def _learn(policy: Policy, lessons: list[Lesson], wire: WireFormat, spec: object) -> tuple[float, float]:
    """Adds one step's gradients; returns the loss per token and the share of lessons known by heart."""
    import torch

    from vz_ray.learner.batch import collate, encode, frames_of, plan
    from vz_ray.learner.pixels import PixelSpec

    assert isinstance(spec, PixelSpec)
    played, pixels = [], {}
    for number, lesson in enumerate(lessons):
        one, frames = trajectory(lesson, wire, number)
        played.append(encode(one, policy.tokens, spec.merge))
        pixels.update(frames)
    total = sum(len(example.sampled) for example in played)
    loss, exact = 0.0, 0
    for indices in plan(played, 8192, 1)[0]:
        batch = collate(indices, played, frames_of(pixels), policy.tokens, spec, torch.device("cpu"))
        logprobs, _ = policy(batch)
        part = -(logprobs * batch.mask).sum() / total
        part.backward()
        loss += part.item()
        exact += int(((logprobs > math.log(0.5)) | (batch.mask == 0)).all(dim=1).sum())
    return loss, exact / len(lessons)
