"""Scripted policies that solve needle tasks from the ground truth."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import Task
from vz_ray.env.trajectory import ExternalAction, SamplingParams

NOTHING_SEEN, TOO_FEW_FRAMES, WRONG_SEGMENT = "nothing", "more frames", "outside"
"""Thoughts about a clip: it does not show the queried event; it has too few frames; its segment is wrong."""


def format_zoom_turn(think: str, start_s: float, end_s: float, fps: float) -> str:
    """Format a zoom turn. Times have two decimals, like the labels of the frames."""
    call = f'{{"segment":[{start_s:.2f},{end_s:.2f}],"fps":{fps:g}}}'
    return f"<think>{think}</think><video_zoom>{call}</video_zoom>"


def format_answer_turn(border: str, symbol: str, answer: str, flash_times_s: Iterable[float] = ()) -> str:
    """Format an answer turn. A count lists the time of each visible flash."""
    return f"<think>{border} border, {symbol}{_format_times(flash_times_s)}</think><answer>{answer}</answer>"


def _format_times(times_s: Iterable[float]) -> str:
    return "".join(f" @{time:.2f}" for time in times_s)


class ZoomOracle:
    """`Policy` for one needle task: zooms along the task's path, including its detours, then answers.

    Args:
        task: Task with ground truth.
        chat_format: Encodes the turns.
        zoom_frames: Frames of a zoom at the full rate, which shows every slot once.
        sparse_zoom_share: Share of zooms at half the rate. They are used only if they still show the
            evidence: the episodes stay correct, but are suboptimal examples.
        seed: Selects those zooms, together with the task id.

    Raises:
        ValueError: The task has no ground truth.
    """

    def __init__(
        self,
        task: Task,
        chat_format: ChatFormat,
        zoom_frames: int,
        *,
        sparse_zoom_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.task, self.chat_format, self.zoom_frames = task, chat_format, zoom_frames
        truth: dict[str, Any] = dict(task.extra)
        if "path" not in truth:
            raise ValueError(f"task {task.task_id} has no ground truth; its manifest must be next to the task file")
        self.zoom_path = [(float(a), float(b)) for a, b in truth["path"]]
        self._borders = [(float(a), float(b)) for a, b in truth["borders"]]
        self.border_starts_s = [start for start, _ in self._borders]
        self.symbol, self.border = str(truth["symbol"]), str(truth["border"])
        rng = random.Random(f"{seed}/{task.task_id}")
        self.frames_per_zoom = [
            zoom_frames // 2
            if rng.random() < sparse_zoom_share and self._shows_evidence(zoom, zoom_frames // 2)
            else zoom_frames
            for zoom in range(len(self.zoom_path))
        ]

    def _shows_evidence(self, zoom: int, frames: int) -> bool:
        """Return whether `frames` frames of a zoom show everything that the next turn needs."""
        start, end = self.zoom_path[zoom]
        times = [start + (end - start) * k / frames for k in range(frames)]
        inside = [
            (a, b) for a, b in (*self.zoom_path[zoom + 1 :], *self.task.evidence_spans) if start <= a and b <= end
        ]
        return all(any(a <= time < b for time in times) for a, b in inside)

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        text = self._turn_text(sum(message.role == "assistant" for message in prompt.messages))
        return ExternalAction(text, self.chat_format.encode_assistant(text))

    def _turn_text(self, turn: int) -> str:
        if turn < len(self.zoom_path):
            start, end = self.zoom_path[turn]
            return format_zoom_turn(
                self._zoom_thought(turn, start), start, end, self.frames_per_zoom[turn] / (end - start)
            )
        listed_times = [start for start, _ in self.task.evidence_spans] if self.task.kind == "count" else []
        return format_answer_turn(self.border, self.symbol, self.task.answer, listed_times)

    def _zoom_thought(self, turn: int, start_s: float) -> str:
        """Return the thought of a zoom turn: the result of the last zoom, and the next place."""
        missed = f"{NOTHING_SEEN}; " if self.task.kind == "decoy" and turn == 1 else ""
        return missed + self._describe_place(turn, start_s)

    def _describe_place(self, turn: int, start_s: float) -> str:
        """Describe the next place: the border, or the night scene that contains it."""
        if self.task.kind == "deep" and turn == 0:
            return f"night @{start_s:.2f}"
        return f"{self.border} border" + _format_times(self.border_starts_s)


class CorrectionOracle(ZoomOracle):
    """`Policy` for one task that continues after the turns of another policy.

    It determines from the frames what is still missing, names the mistake, zooms there at the full rate, and
    answers when the evidence is complete. It answers at once if the earlier zooms were sufficient.

    The named mistake is one of:

    - `nothing; more frames`: correct segment, too few frames;
    - `disc @12.50; more frames`: correct segment, only some of the counted flashes visible;
    - `outside`: wrong segment;
    - `nothing`: the decoy, one of two segments with the border.
    """

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        text = self._next_turn([frame.pts_s for frame in prompt.frames], _last_clip_times(prompt))
        return ExternalAction(text, self.chat_format.encode_assistant(text))

    def _next_turn(self, times: Sequence[float], last_clip: Sequence[float]) -> str:
        """Return the next turn after frames at `times`, of which `last_clip` are in the latest clip."""
        turn = next((turn for turn in range(len(self.zoom_path)) if not self._is_covered(turn, times)), None)
        if turn is None or self._is_covered(len(self.zoom_path) - 1, times):
            return self._turn_text(len(self.zoom_path))
        start, end = self.zoom_path[turn]
        think = self._name_mistake(turn, last_clip) + self._describe_place(turn, start)
        return format_zoom_turn(think, start, end, self.zoom_frames / (end - start))

    def _is_covered(self, turn: int, times: Sequence[float]) -> bool:
        """Return whether frames at `times` cover this segment of the path."""
        if turn == len(self.zoom_path) - 1:
            shows_evidence = all(_any_in(times, *span) for span in self.task.evidence_spans)
            # A count needs every slot: a flash may occur between two frames.
            return shows_evidence and (self.task.kind != "count" or self._shows_every_slot(turn, times))
        if self.task.kind == "deep":
            return _any_in(times, *self.zoom_path[-1])
        return self._shows_every_slot(turn, times)

    def _shows_every_slot(self, turn: int, times: Sequence[float]) -> bool:
        start, end = self.zoom_path[turn]
        edges = [start + (end - start) * k / self.zoom_frames for k in range(self.zoom_frames + 1)]
        return all(_any_in(times, *slot) for slot in pairwise(edges))

    def _name_mistake(self, turn: int, last_clip: Sequence[float]) -> str:
        """Return what the latest clip lacked, as the start of the next thought."""
        (night, dawn), (start, end) = self.zoom_path[0], self.zoom_path[-1]
        is_night_clip = _any_in(last_clip, night, start) or _any_in(last_clip, end, dawn)
        if turn and self.task.kind == "deep" and is_night_clip:
            return ""  # the clip shows the night scene and the border: no mistake
        if _any_in(last_clip, *self.zoom_path[turn]):
            flashes = [start for start, end in self.task.evidence_spans if _any_in(last_clip, start, end)]
            observed = f"{self.symbol}{_format_times(flashes)}" if flashes else NOTHING_SEEN
            return f"{observed}; {TOO_FEW_FRAMES}; "
        decoys = [span for span in self._borders if span != self.zoom_path[-1]]
        is_decoy = any(_any_in(last_clip, *span) for span in decoys)
        return f"{NOTHING_SEEN}; " if is_decoy else f"{WRONG_SEGMENT}; "


def _any_in(times: Iterable[float], start_s: float, end_s: float) -> bool:
    return any(start_s <= time < end_s for time in times)


def _last_clip_times(prompt: Prompt) -> list[float]:
    """Return the times of the latest frames."""
    frames = next((message.frames for message in reversed(prompt.messages) if message.frames), ())
    return [frame.pts_s for frame in frames]


class UniformOracle:
    """`Policy` for one task that answers at once and describes what the frames show.

    If the frames do not show the evidence, the model can only learn the prior of the answers.
    """

    def __init__(self, task: Task, chat_format: ChatFormat) -> None:
        self.task, self.chat_format = task, chat_format
        self.symbol, self.border = str(task.extra["symbol"]), str(task.extra["border"])

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        times = [frame.pts_s for frame in prompt.frames]
        first_times = [next((t for t in times if a <= t < b), None) for a, b in self.task.evidence_spans]
        visible = [time for time in first_times if time is not None]
        listed_times = visible if self.task.kind == "count" else []
        symbol = self.symbol if visible else NOTHING_SEEN
        text = format_answer_turn(self.border, symbol, self.task.answer, listed_times)
        return ExternalAction(text, self.chat_format.encode_assistant(text))
