"""Training of the tiny base model, which can describe frames and answer, but has never seen a zoom.

Supervised training with a curriculum: naming, then albums of 2 to 16 frames, then needle videos of up to
`max_frames` frames.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.env.chat_format import ChatFormat
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
from vz_ray.needle.tiny_families import find_tiny_family
from vz_ray.needle.tiny_model import build_tiny_model, save_hf_model
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.resources import find_resource

if TYPE_CHECKING:
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    from vz_ray.learner.policy_model import PolicyModel

LOG_INTERVAL_STEPS, SAVE_INTERVAL_STEPS = 20, 250
TRAINING_STATE_FILE = "training.pt"
"""Resume checkpoint in the model directory."""
DEFAULT_BASE = Path("assets/tiny-base")
DEFAULT_PROMPT = "conf/prompt/tiny-answer.yaml"


@dataclass(frozen=True, slots=True)
class BaseTrainingConfig:
    """Hyperparameters of the base training.

    Attributes:
        steps: Optimizer steps.
        batch_tokens: Approximate tokens per step.
        learning_rate: Peak learning rate of the layers' matrices.
        max_frames: Maximum frames of a lesson.
        seed: Seed of weights and lessons.
        family: Family of the model, an HF model type.
        naming_share: Share of the steps that only train naming, at the start.
        album_share: Share of the steps before needle videos.
    """

    steps: int = 3600
    batch_tokens: int = 3000
    learning_rate: float = 2.25e-3
    max_frames: int = 128
    seed: int = 0
    family: str = "qwen2_5_vl"
    naming_share: float = 0.06
    album_share: float = 0.62

    @classmethod
    def for_family(cls, family: str, *, steps: int = 0, seed: int = 0) -> BaseTrainingConfig:
        """Return the schedule of a family; `steps` 0 is its default.

        Families that start from the text weights of the Qwen2.5-VL base learn to see, and adapt to their layers.
        """
        tiny = find_tiny_family(family)
        config = cls(steps or tiny.base_steps, seed=seed, family=family)
        if tiny.starts_from_base:
            return replace(config, learning_rate=1.5e-3, naming_share=0.15, album_share=0.35)
        return config

    def lr_factor(self, step: int) -> float:
        """Return the learning rate factor: warm-up, constant, cosine decay."""
        decay = max(0.0, 3 * step / self.steps - 2)
        return min(1.0, (step + 1) / min(100, self.steps / 10)) * (0.02 + 0.98 * (1 + math.cos(math.pi * decay)) / 2)

    def lesson_kind(self, step: int) -> tuple[str, int]:
        """Return the kind and the maximum frames of the lessons at `step`."""
        progress = step / self.steps
        if progress < self.naming_share or step % 8 == 0:
            return "naming", MAX_NAMING_FRAMES
        if progress < self.album_share:
            schedule = ((0.08, 2), (0.25, 4), (0.35, 8), (1.0, 16))
            frames = next(n for until, n in schedule if progress < until)
            # Short albums stay in the mix: their skills transfer to long ones.
            return "album", min(frames, 4) if step % 4 == 1 else frames
        frames = (16, 16, 32, 64, 8, 16, 128)[step % 7]
        return ("album" if step % 7 == 1 else "needle"), min(frames, self.max_frames)

    def make_lessons(self, step: int) -> list[Lesson]:
        """Return the lessons of a step, a pure function of seed and step."""
        kind, max_frames = self.lesson_kind(step)
        rng = random.Random(f"{self.seed}/{step}")
        if kind == "naming":
            return [make_naming_lesson(rng) for _ in range(self.batch_tokens // 60)]
        make = make_album_lesson if kind == "album" else make_needle_lesson
        return [make(rng, max_frames) for _ in range(max(4, self.batch_tokens // (220 + 6 * max_frames)))]


def make_tokenizer_corpus(seed: int = 0) -> list[str]:
    """Return samples of all texts of the needle world, for the tokenizer."""
    rng = random.Random(seed)
    lessons = [make(rng, NUM_SHOTS) for make in (make_album_lesson, make_needle_lesson) for _ in range(40)]
    lessons += [make_naming_lesson(rng) for _ in range(20)]
    texts = [text for lesson in lessons for pair in lesson.questions for text in pair]
    texts += [format_zoom_turn("red border, nothing; @12.00", 12.0, 24.0, fps) for fps in (0.25, 0.5, 1.0, 2.0, 4.0)]
    texts += [
        "<|im_start|>system\nAnswer from the frames. You may zoom.<|im_end|>\n<|im_start|>user\n",
        "<tool_response>Error: </tool_response> Answer now.<|im_start|>assistant\n",
        "night @12.00. segment [12, 24] at fps 1 has more than 8 frames; fps up to 0.5 would fit",
        "segment is reversed; start must come before end. segment is outside the video of 64.00 seconds",
        "no zoom is left; answer from what you have seen. the call is not valid JSON; expected",
    ]
    return texts


def build_base_model(
    directory: Path,
    training: BaseTrainingConfig,
    *,
    threads: int,
    prompt: str = DEFAULT_PROMPT,
    start: Path = DEFAULT_BASE,
) -> None:
    """Build and train the tiny base model with a progress display; resume an interrupted training.

    Args:
        directory: Checkpoint directory.
        training: Family and hyperparameters.
        threads: CPU threads.
        prompt: Prompt file without zooms.
        start: Qwen2.5-VL base from which other families start.

    Raises:
        UserError: `directory` exists, or `start` is missing.
    """
    import torch

    if directory.exists():
        raise UserError(f"{directory} exists; choose another directory or delete it")
    torch.set_num_threads(threads)
    work_dir = directory.with_name(f".{directory.name}.partial")
    if not (work_dir / TRAINING_STATE_FILE).exists():
        shutil.rmtree(work_dir, ignore_errors=True)
        build_tiny_model(
            work_dir,
            make_tokenizer_corpus(),
            seed=training.seed,
            config=find_tiny_family(training.family).base_sizes,
            family=training.family,
            start=find_resource(start) if find_tiny_family(training.family).starts_from_base else None,
        )
    chat_format = load_chat_format(work_dir, EpisodeConfig(prompt=prompt))
    with Progress() as progress, progress.stage("base", training.steps) as stage:

        def log(step: int, values: Mapping[str, float]) -> None:
            stage.advance(step - stage.done)
            progress.show_metrics(values)

        train_base_model(work_dir, chat_format, training, log)
    work_dir.rename(directory)


def train_base_model(
    directory: Path,
    chat_format: ChatFormat,
    training: BaseTrainingConfig,
    log: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Train the checkpoint in `directory` in place.

    Args:
        directory: Checkpoint from `build_tiny_model`.
        chat_format: Prompt template and tokenizer.
        training: Hyperparameters.
        log: Callback every `LOG_INTERVAL_STEPS` steps with the loss and the share of exactly reproduced
            lessons, by kind and maximum frames.
    """
    import torch

    from vz_ray.learner.image_patches import ImageSpec
    from vz_ray.learner.policy_model import PolicyModel

    policy = PolicyModel.from_pretrained(directory)
    spec = ImageSpec.from_pretrained(directory)
    frozen = find_tiny_family(training.family).vision_projections(policy.hf)
    optimizers = _build_optimizers(policy, frozen, training.learning_rate)
    first_step = _resume(policy, optimizers, directory / TRAINING_STATE_FILE)
    metrics: dict[str, list[float]] = defaultdict(list)
    start_s = time.monotonic()
    for step in range(first_step, training.steps):
        loss, exact = _accumulate_gradients(policy, training.make_lessons(step), chat_format, spec)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.lr_factor(step) * group["peak"]
            optimizer.step()
            optimizer.zero_grad()
        kind, max_frames = training.lesson_kind(step)
        metrics[f"loss/{kind} {max_frames}"].append(loss)
        metrics[f"exact/{kind} {max_frames}"].append(exact)
        if step % LOG_INTERVAL_STEPS == LOG_INTERVAL_STEPS - 1:
            log(step + 1, _means(metrics) | {"seconds": time.monotonic() - start_s})
            metrics.clear()
        if step % SAVE_INTERVAL_STEPS == SAVE_INTERVAL_STEPS - 1:
            _save(policy, optimizers, step + 1, directory)
    save_hf_model(policy.hf, directory)
    (directory / TRAINING_STATE_FILE).unlink(missing_ok=True)


def _build_optimizers(policy: PolicyModel, frozen: Sequence[Module], learning_rate: float) -> list[Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the other parameters; each group stores its `peak`
    rate.

    Args:
        policy: Model to train.
        frozen: The projections from frames to text embeddings. Their scale would grow and dominate the
            information from other tokens that the frame tokens must carry.
        learning_rate: Peak learning rate of the layers' matrices.
    """
    import torch

    from vz_ray.needle.muon import Muon

    layers: list[Parameter] = []
    vision: list[Parameter] = []
    other: list[Parameter] = []
    for module in frozen:
        module.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and ".layers." in name
        (vision if "visual" in name else layers if is_matrix else other).append(parameter)
    muon = Muon(layers, lr=learning_rate, weight_decay=0.01)
    adam = torch.optim.AdamW(
        [{"params": vision, "lr": learning_rate / 2}, {"params": other, "lr": learning_rate * 4 / 3}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def _means(metrics: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in sorted(metrics.items())}


def _save(policy: PolicyModel, optimizers: list[Optimizer], step: int, directory: Path) -> None:
    import torch

    content = io.BytesIO()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "policy": policy.state_dict(), "optimizers": states}, content)
    write_atomic(directory / TRAINING_STATE_FILE, content.getvalue())
    save_hf_model(policy.hf, directory)


def _resume(policy: PolicyModel, optimizers: list[Optimizer], state: Path) -> int:
    """Load the resume checkpoint, if any; return the next step."""
    import torch

    if not state.exists():
        return 0
    content = torch.load(state, weights_only=True)
    policy.load_state_dict(content["policy"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(content["step"])


def _accumulate_gradients(
    policy: PolicyModel, lessons: list[Lesson], chat_format: ChatFormat, spec: object
) -> tuple[float, float]:
    """Accumulate the gradients of one step; return the loss per token and the share of reproduced lessons."""
    import torch

    from vz_ray.learner.batch import collate
    from vz_ray.learner.example import encode_trajectory
    from vz_ray.learner.image_inputs import in_memory_pixels
    from vz_ray.learner.image_patches import ImageSpec
    from vz_ray.learner.packing import plan_micro_batches

    assert isinstance(spec, ImageSpec)
    examples, pixels = [], {}
    for number, lesson in enumerate(lessons):
        trajectory, frames = lesson_to_trajectory(lesson, chat_format, number)
        examples.append(encode_trajectory(trajectory, policy.tokens, spec.merge_size))
        pixels.update(frames)
    total = sum(len(example.sampled_positions) for example in examples)
    loss, exact = 0.0, 0
    for trees in plan_micro_batches(examples, 8192, 1)[0]:
        batch = collate(trees, examples, in_memory_pixels(pixels), policy.tokens, spec, torch.device("cpu"))
        logprobs, _ = policy(batch)
        batch_loss = -(logprobs * batch.mask).sum() / total
        batch_loss.backward()
        loss += batch_loss.item()
        exact += int(((logprobs > math.log(0.5)) | (batch.mask == 0)).all(dim=1).sum())
    return loss, exact / len(lessons)
