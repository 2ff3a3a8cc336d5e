"""Trains the tiny model's base, which can name and answer but has never seen a zoom.

Plain supervised training on lessons that grow longer: names, then albums of two
frames up to an overview's sixteen, then needle videos in up to `longest` frames.
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

from vz_ray.coldstart.lessons import MOMENTS, Lesson, album_lesson, naming_lesson, trajectory, world_lesson
from vz_ray.coldstart.oracle import zoom_text
from vz_ray.coldstart.tiny import build_tiny
from vz_ray.data.needle.world import SHOTS
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.observe.errors import UserError
from vz_ray.observe.progress import Progress
from vz_ray.observe.run_dir import write_atomic

if TYPE_CHECKING:
    from torch.nn import Parameter
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
        learning_rate: Peak of the cosine, for the matrices of the layers.
        longest: Most frames in a lesson.
        seed: Makes weights and lessons.
    """

    steps: int = 3600
    batch_tokens: int = 3000
    learning_rate: float = 2.25e-3
    longest: int = 128
    seed: int = 0

    def rate(self, step: int) -> float:
        """Share of the rate at `step`: warm-up over 100 steps, constant, cosine over the last third."""
        late = max(0.0, 3 * step / self.steps - 2)
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)

    def topic(self, step: int) -> tuple[str, int]:
        """Kind of the lessons of `step`, and the most frames of one."""
        done = step / self.steps
        if done < 0.06 or step % 8 == 0:
            return "naming", MOMENTS
        if done < 0.62:
            most = next(n for until, n in ((0.08, 2), (0.25, 4), (0.35, 8), (1.0, 16)) if done < until)
            # Short ones stay in the mix: what is learned there first carries over.
            return "album", min(most, 4) if step % 4 == 1 else most
        most = (16, 16, 32, 64, 8, 16, 128)[step % 7]
        return ("album" if step % 7 == 1 else "world"), min(most, self.longest)

    def lessons(self, step: int) -> list[Lesson]:
        """As many lessons as fit a step; a pure function of seed and step."""
        kind, most = self.topic(step)
        rng = random.Random(f"{self.seed}/{step}")
        if kind == "naming":
            return [naming_lesson(rng) for _ in range(self.batch_tokens // 60)]
        make = album_lesson if kind == "album" else world_lesson
        return [make(rng, most) for _ in range(max(4, self.batch_tokens // (220 + 6 * most)))]


def corpus(seed: int = 0) -> list[str]:
    """Samples of everything that is ever said in the needle world, for the tokenizer."""
    rng = random.Random(seed)
    lessons = [make(rng, SHOTS) for make in (album_lesson, world_lesson) for _ in range(40)]
    lessons += [naming_lesson(rng) for _ in range(20)]
    said = [text for lesson in lessons for pair in lesson.exchanges for text in pair]
    said += [zoom_text("red border, nothing; @12.00", 12.0, 24.0, fps) for fps in (0.25, 0.5, 1.0, 2.0, 4.0)]
    said += [
        "<|im_start|>system\nAnswer from the frames. You may zoom.<|im_end|>\n<|im_start|>user\n",
        "<tool_response>Error: </tool_response> Answer now.<|im_start|>assistant\n",
        "night @12.00. segment [12, 24] at fps 1 has more than 8 frames; fps up to 0.5 would fit",
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
    optimizers = _optimizers(policy, training.learning_rate)
    first = _resume(policy, optimizers, directory / STATE)
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic()
    for step in range(first, training.steps):
        loss, exact = _learn(policy, training.lessons(step), wire, spec)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step) * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        kind, most = training.topic(step)
        seen[f"loss/{kind} {most}"].append(loss)
        seen[f"exact/{kind} {most}"].append(exact)
        if step % LOG_EVERY == LOG_EVERY - 1:
            log(step + 1, _means(seen) | {"seconds": time.monotonic() - began})
            seen.clear()
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            _save(policy, optimizers, step + 1, directory)
    policy.hf.save_pretrained(directory)
    (directory / STATE).unlink(missing_ok=True)


def _optimizers(policy: Policy, rate: float) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; each group knows its `peak` rate.

    The projection from frames to words keeps the scale it was made with: it would grow,
    and drown the traces of other tokens that frames and times must carry.
    """
    import torch

    layers: list[Parameter] = []
    vision: list[Parameter] = []
    rest: list[Parameter] = []
    for parameter in policy.hf.model.visual.merger.mlp[-1].parameters():
        parameter.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim == 2 and ".layers." in name
        (vision if "visual" in name else layers if matrix else rest).append(parameter)
    muon = torch.optim.Muon(layers, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": vision, "lr": rate / 2}, {"params": rest, "lr": rate * 4 / 3}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def _means(seen: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in sorted(seen.items())}


def _save(policy: Policy, optimizers: list[Optimizer], step: int, directory: Path) -> None:
    import torch

    content = io.BytesIO()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "policy": policy.state_dict(), "optimizers": states}, content)
    write_atomic(directory / STATE, content.getvalue())
    policy.hf.save_pretrained(directory)


def _resume(policy: Policy, optimizers: list[Optimizer], state: Path) -> int:
    """Loads what `_save` wrote, if there is anything; returns the step to go on with."""
    import torch

    if not state.exists():
        return 0
    content = torch.load(state, weights_only=True)
    policy.load_state_dict(content["policy"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(content["step"])


def _learn(policy: Policy, lessons: list[Lesson], wire: WireFormat, spec: object) -> tuple[float, float]:
    """Adds one step's gradients; returns the loss per token and the share of lessons known by heart."""
    import torch

    from vz_ray.learner.batch import collate, frames_of
    from vz_ray.learner.example import encode
    from vz_ray.learner.packing import plan
    from vz_ray.learner.pixels import PixelSpec

    assert isinstance(spec, PixelSpec)
    played, pixels = [], {}
    for number, lesson in enumerate(lessons):
        one, frames = trajectory(lesson, wire, number)
        played.append(encode(one, policy.tokens, spec.merge))
        pixels.update(frames)
    total = sum(len(example.sampled) for example in played)
    loss, exact = 0.0, 0
    for trees in plan(played, 8192, 1)[0]:
        batch = collate(trees, played, frames_of(pixels), policy.tokens, spec, torch.device("cpu"))
        logprobs, _ = policy(batch)
        part = -(logprobs * batch.mask).sum() / total
        part.backward()
        loss += part.item()
        exact += int(((logprobs > math.log(0.5)) | (batch.mask == 0)).all(dim=1).sum())
    return loss, exact / len(lessons)
