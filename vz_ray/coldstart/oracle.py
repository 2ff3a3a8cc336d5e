"""Plays needle tasks from their truth: the expert of the quickstart's cold start."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from vz_ray.data.task import Task
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.trajectory import Sampling, Written
from vz_ray.episode.wire import WireFormat


def zoom_text(think: str, start_s: float, end_s: float, fps: float) -> str:
    """A zoom turn; times have two digits, as they are shown beside the frames."""
    call = f'{{"segment":[{start_s:.2f},{end_s:.2f}],"fps":{fps:g}}}'
    return f"<think>{think}</think><video_zoom>{call}</video_zoom>"


def answer_text(border: str, symbol: str, answer: str, seen_at_s: Iterable[float] = ()) -> str:
    """An answer turn; a count lists when each flash was seen."""
    times = "".join(f" @{time:.2f}" for time in seen_at_s)
    return f"<think>{border} border, {symbol}{times}</think><answer>{answer}</answer>"


class Oracle:
    """A `Policy` for one task of the needle world.

    It zooms along the task's path, wrong turns included, and answers what it
    then must have seen.

    Args:
        task: A task with its truth.
        wire: Writes its turns.
        zoom_frames: Frames in a zoom at the right rate, which shows every slot once.
        sparse: Share of its zooms that it tries at half the right rate; it does so only
            where that happens to show what it must see, so it is never wrong, but its
            example is a bad one to follow.
        seed: Draws those zooms, together with the task's id.
    """

    def __init__(
        self, task: Task, wire: WireFormat, zoom_frames: int, *, sparse: float = 0.0, seed: int = 0
    ) -> None:
        self.task, self.wire, self.zoom_frames = task, wire, zoom_frames
        truth: dict[str, Any] = dict(task.extra)
        if "path" not in truth:
            raise ValueError(
                f"task {task.task_id} has no truth to play from: is its manifest beside the task file?"
            )
        self.path = [(float(a), float(b)) for a, b in truth["path"]]
        self.shown = [float(start) for start, _ in truth["borders"]]
        self.symbol, self.border = str(truth["symbol"]), str(truth["border"])
        rng = random.Random(f"{seed}/{task.task_id}")
        self.frames = [
            zoom_frames // 2
            if rng.random() < sparse and self._enough(zoom, zoom_frames // 2)
            else zoom_frames
            for zoom in range(len(self.path))
        ]

    def _enough(self, zoom: int, frames: int) -> bool:
        """Whether `frames` frames show all that must be seen there to zoom on, or to answer."""
        start, end = self.path[zoom]
        times = [start + (end - start) * k / frames for k in range(frames)]
        inside = [(a, b) for a, b in (*self.path[zoom + 1 :], *self.task.events) if start <= a and b <= end]
        return all(any(a <= time < b for time in times) for a, b in inside)

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Written:
        text = self._say(sum(message.role == "assistant" for message in prompt.messages))
        return Written(text, self.wire.written(text))

    def _say(self, turn: int) -> str:
        if turn < len(self.path):
            start, end = self.path[turn]
            return zoom_text(self._think(turn, start), start, end, self.frames[turn] / (end - start))
        counted = [start for start, _ in self.task.events] if self.task.kind == "count" else []
        return answer_text(self.border, self.symbol, self.task.answer, counted)

    def _think(self, turn: int, start_s: float) -> str:
        """Where the border is, as far as it has been seen, after what was missed before."""
        if self.task.kind == "deep" and turn == 0:
            return f"night @{start_s:.2f}"
        missed = "nothing; " if self.task.kind == "decoy" and turn == 1 else ""
        return f"{missed}{self.border} border" + "".join(f" @{shown:.2f}" for shown in self.shown)


class UniformOracle:
    """A `Policy` for one task that answers at once, whether or not its frames show the answer.

    It says what they show; where they do not show the answer it can only be
    guessed, and what is learned from it is how often which answer is right.
    """

    def __init__(self, task: Task, wire: WireFormat) -> None:
        self.task, self.wire = task, wire
        self.symbol, self.border = str(task.extra["symbol"]), str(task.extra["border"])

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Written:
        times = [frame.pts_s for frame in prompt.frames]
        seen = [next((t for t in times if a <= t < b), None) for a, b in self.task.events]
        shown = [time for time in seen if time is not None]
        counted = shown if self.task.kind == "count" else []
        symbol = self.symbol if shown else "nothing"
        text = answer_text(self.border, symbol, self.task.answer, counted)
        return Written(text, self.wire.written(text))
