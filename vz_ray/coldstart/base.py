"""Trains the tiny model's base, which can name and answer but has never seen a zoom.

Plain supervised training on lessons that grow longer: first a few frames,
then overviews, then up to `longest` uniform frames.
"""

from __future__ import annotations

import io
import math
import random
import shutil
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
from vz_ray.observe.run_dir import write_atomic

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from vz_ray.learner.model import Policy

LOG_EVERY, SAVE_EVERY = 20, 250
"""Steps."""
STATE = "training.pt"
"""What an interrupted training goes on from, in the directory that it trains."""
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

    steps: int = 6000
    batch_tokens: int = 4000
    learning_rate: float = 1.5e-3
    longest: int = 128
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at `step`: warm-up over 100 steps, constant, cosine over the last third."""
        late = max(0.0, 3 * step / self.steps - 2)
        return (
            self.learning_rate
            * min(1.0, (step + 1) / 100)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)
        )

    def frames(self, step: int) -> int:
        """The most frames of a lesson at `step`; 0 stands for the naming lesson.

        First names, then a few frames in a row, then overviews, then up to `longest`.
        """
        done = step / self.steps
        if done < 0.04 or (done < 0.15 and step % 8 == 0):
            return 0
        if done < 0.85:
            most = next(n for until, n in ((0.15, 4), (0.21, 8), (2, 16)) if done < until)
            # Short ones stay in the mix: what is learned there first carries over.
            return 4 if step % 3 == 0 else most
        return min((16, 16, 32, 64, 16, 32, 128, 16)[step % 8], self.longest)

    def lessons(self, step: int) -> list[Lesson]:
        """As many lessons as fit a step; a pure function of seed and step."""
        frames = self.frames(step)
        rng = random.Random(f"{self.seed}/{step}")
        if frames == 0:
            return [naming_lesson(rng) for _ in range(self.batch_tokens // 70)]
        count = max(4, self.batch_tokens // (160 + 9 * min(frames, 50)))
        apart = step >= 0.6 * self.steps
        return [make_lesson(rng, frames, apart=apart) for _ in range(count)]


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
    """Builds the tiny model and trains its base, with progress on the terminal; goes on where it was stopped.

    Raises:
        UserError: `directory` exists.
    """
    import torch
    from transformers import AutoTokenizer

    if directory.exists():
        raise UserError(f"{directory} exists; choose another directory or delete it")
    torch.set_num_threads(threads)
    work = directory.with_name(f".{directory.name}.partial")
    if not (work / STATE).exists():
        shutil.rmtree(work, ignore_errors=True)
        build_tiny(work, corpus(), seed=training.seed)
    wire = WireFormat(AutoTokenizer.from_pretrained(work), Wording.load(wording))
    with Progress() as progress, progress.stage("base", training.steps) as stage:

        def log(step: int, values: Mapping[str, float]) -> None:
            stage.advance(step - stage.done)
            progress.show(values)

        train_base(work, wire, training, log)
    work.rename(directory)


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
    first = _resume(policy, optimizer, directory / STATE)
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic()
    for step in range(first, training.steps):
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
            log(step + 1, _means(seen) | {"seconds": time.monotonic() - began})
            seen.clear()
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            _save(policy, optimizer, step + 1, directory)
    policy.hf.save_pretrained(directory)
    (directory / STATE).unlink(missing_ok=True)


def _means(seen: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in sorted(seen.items())}


def _save(policy: Policy, optimizer: Optimizer, step: int, directory: Path) -> None:
    import torch

    content = io.BytesIO()
    torch.save({"step": step, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, content)
    write_atomic(directory / STATE, content.getvalue())
    policy.hf.save_pretrained(directory)


def _resume(policy: Policy, optimizer: Optimizer, state: Path) -> int:
    """Loads what `_save` wrote, if there is anything; returns the step to go on with."""
    import torch

    if not state.exists():
        return 0
    content = torch.load(state, weights_only=True)
    policy.load_state_dict(content["policy"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["step"])


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
