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

from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.monitoring.progress import Progress
from vz_ray.needle.curriculum import (
    MAX_NAMING_FRAMES,
    Lesson,
    lesson_to_trajectory,
    make_album_lesson,
    make_naming_lesson,
    make_needle_lesson,
)
from vz_ray.needle.needle_video import NUM_SHOTS
from vz_ray.needle.oracle import format_zoom_turn
from vz_ray.needle.tiny_model import build_tiny_model
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from vz_ray.learner.policy_model import PolicyModel

LOG_INTERVAL_STEPS, SAVE_INTERVAL_STEPS = 20, 250
"""Steps."""
TRAINING_STATE_FILE = "training.pt"
"""What an interrupted training goes on from, in the directory that it trains."""
DEFAULT_PROMPT = "conf/prompt/tiny-answer.yaml"


@dataclass(frozen=True, slots=True)
class BaseTrainingConfig:
    """How the base is trained.

    Attributes:
        steps: Optimizer steps.
        batch_tokens: Tokens in a step, about.
        learning_rate: Peak of the cosine, for the matrices of the layers.
        max_frames: Most frames in a lesson.
        seed: Makes weights and lessons.
    """

    steps: int = 3600
    batch_tokens: int = 3000
    learning_rate: float = 2.25e-3
    max_frames: int = 128
    seed: int = 0

    def lr_factor(self, step: int) -> float:
        """Share of the rate at `step`: warm-up over 100 steps, constant, cosine over the last third."""
        late = max(0.0, 3 * step / self.steps - 2)
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)

    def lesson_kind(self, step: int) -> tuple[str, int]:
        """Kind of the lessons of `step`, and the most frames of one."""
        done = step / self.steps
        if done < 0.06 or step % 8 == 0:
            return "naming", MAX_NAMING_FRAMES
        if done < 0.62:
            most = next(n for until, n in ((0.08, 2), (0.25, 4), (0.35, 8), (1.0, 16)) if done < until)
            # Short ones stay in the mix: what is learned there first carries over.
            return "album", min(most, 4) if step % 4 == 1 else most
        most = (16, 16, 32, 64, 8, 16, 128)[step % 7]
        return ("album" if step % 7 == 1 else "world"), min(most, self.max_frames)

    def make_lessons(self, step: int) -> list[Lesson]:
        """As many lessons as fit a step; a pure function of seed and step."""
        kind, most = self.lesson_kind(step)
        rng = random.Random(f"{self.seed}/{step}")
        if kind == "naming":
            return [make_naming_lesson(rng) for _ in range(self.batch_tokens // 60)]
        make = make_album_lesson if kind == "album" else make_needle_lesson
        return [make(rng, most) for _ in range(max(4, self.batch_tokens // (220 + 6 * most)))]


def make_tokenizer_corpus(seed: int = 0) -> list[str]:
    """Samples of everything that is ever said in the needle world, for the tokenizer."""
    rng = random.Random(seed)
    lessons = [make(rng, NUM_SHOTS) for make in (make_album_lesson, make_needle_lesson) for _ in range(40)]
    lessons += [make_naming_lesson(rng) for _ in range(20)]
    said = [text for lesson in lessons for pair in lesson.questions for text in pair]
    said += [
        format_zoom_turn("red border, nothing; @12.00", 12.0, 24.0, fps) for fps in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]
    said += [
        "<|im_start|>system\nAnswer from the frames. You may zoom.<|im_end|>\n<|im_start|>user\n",
        "<tool_response>Error: </tool_response> Answer now.<|im_start|>assistant\n",
        "night @12.00. segment [12, 24] at fps 1 has more than 8 frames; fps up to 0.5 would fit",
        "segment is reversed; start must come before end. segment is outside the video of 64.00 seconds",
        "no zoom is left; answer from what you have seen. the call is not valid JSON; expected",
    ]
    return said


def build_base_model(
    directory: Path, training: BaseTrainingConfig, *, threads: int, prompt: str = DEFAULT_PROMPT
) -> None:
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
    if not (work / TRAINING_STATE_FILE).exists():
        shutil.rmtree(work, ignore_errors=True)
        build_tiny_model(work, make_tokenizer_corpus(), seed=training.seed)
    wire = ChatFormat(AutoTokenizer.from_pretrained(work), PromptTemplate.load(prompt))
    with Progress() as progress, progress.stage("base", training.steps) as stage:

        def log(step: int, values: Mapping[str, float]) -> None:
            stage.advance(step - stage.done)
            progress.show_metrics(values)

        train_base_model(work, wire, training, log)
    work.rename(directory)


def train_base_model(
    directory: Path,
    wire: ChatFormat,
    training: BaseTrainingConfig,
    log: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Trains the checkpoint in `directory` in place.

    Args:
        directory: A tiny checkpoint, as `build_tiny` writes it.
        wire: Wording and tokenizer.
        training: Steps and rates.
        log: Called every `LOG_INTERVAL_STEPS` steps with the loss and the share of lessons
            repeated token for token, by most frames.
    """
    import torch

    from vz_ray.learner.image_patches import ImageSpec
    from vz_ray.learner.policy_model import PolicyModel

    policy = PolicyModel.from_pretrained(directory)
    spec = ImageSpec.from_pretrained(directory)
    optimizers = _optimizers(policy, training.learning_rate)
    first = _resume(policy, optimizers, directory / TRAINING_STATE_FILE)
    seen: dict[str, list[float]] = defaultdict(list)
    began = time.monotonic()
    for step in range(first, training.steps):
        loss, exact = _learn(policy, training.make_lessons(step), wire, spec)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.lr_factor(step) * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        kind, most = training.lesson_kind(step)
        seen[f"loss/{kind} {most}"].append(loss)
        seen[f"exact/{kind} {most}"].append(exact)
        if step % LOG_INTERVAL_STEPS == LOG_INTERVAL_STEPS - 1:
            log(step + 1, _means(seen) | {"seconds": time.monotonic() - began})
            seen.clear()
        if step % SAVE_INTERVAL_STEPS == SAVE_INTERVAL_STEPS - 1:
            _save(policy, optimizers, step + 1, directory)
    policy.hf.save_pretrained(directory)
    (directory / TRAINING_STATE_FILE).unlink(missing_ok=True)


def _optimizers(policy: PolicyModel, rate: float) -> list[Optimizer]:
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


def _save(policy: PolicyModel, optimizers: list[Optimizer], step: int, directory: Path) -> None:
    import torch

    content = io.BytesIO()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "policy": policy.state_dict(), "optimizers": states}, content)
    write_atomic(directory / TRAINING_STATE_FILE, content.getvalue())
    policy.hf.save_pretrained(directory)


def _resume(policy: PolicyModel, optimizers: list[Optimizer], state: Path) -> int:
    """Loads what `_save` wrote, if there is anything; returns the step to go on with."""
    import torch

    if not state.exists():
        return 0
    content = torch.load(state, weights_only=True)
    policy.load_state_dict(content["policy"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(content["step"])


def _learn(policy: PolicyModel, lessons: list[Lesson], wire: ChatFormat, spec: object) -> tuple[float, float]:
    """Adds one step's gradients; returns the loss per token and the share of lessons known by heart."""
    import torch

    from vz_ray.learner.batch import collate, in_memory_pixels
    from vz_ray.learner.example import encode_trajectory
    from vz_ray.learner.image_patches import ImageSpec
    from vz_ray.learner.packing import plan_micro_batches

    assert isinstance(spec, ImageSpec)
    played, pixels = [], {}
    for number, lesson in enumerate(lessons):
        one, frames = lesson_to_trajectory(lesson, wire, number)
        played.append(encode_trajectory(one, policy.tokens, spec.merge_size))
        pixels.update(frames)
    total = sum(len(example.sampled_positions) for example in played)
    loss, exact = 0.0, 0
    for trees in plan_micro_batches(played, 8192, 1)[0]:
        batch = collate(trees, played, in_memory_pixels(pixels), policy.tokens, spec, torch.device("cpu"))
        logprobs, _ = policy(batch)
        part = -(logprobs * batch.mask).sum() / total
        part.backward()
        loss += part.item()
        exact += int(((logprobs > math.log(0.5)) | (batch.mask == 0)).all(dim=1).sum())
    return loss, exact / len(lessons)
