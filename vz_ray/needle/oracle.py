"""Plays needle tasks from their truth: the expert of the quickstart's cold start."""

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
"""Said of a clip: it shows nothing of what is asked about; it has too few frames; it is of another place."""


def format_zoom_turn(think: str, start_s: float, end_s: float, fps: float) -> str:
    """A zoom turn; times have two digits, as they are shown beside the frames."""
    call = f'{{"segment":[{start_s:.2f},{end_s:.2f}],"fps":{fps:g}}}'
    return f"<think>{think}</think><video_zoom>{call}</video_zoom>"


def format_answer_turn(border: str, symbol: str, answer: str, seen_at_s: Iterable[float] = ()) -> str:
    """An answer turn; a count lists when each flash was seen."""
    return f"<think>{border} border, {symbol}{_at(seen_at_s)}</think><answer>{answer}</answer>"


def _at(times_s: Iterable[float]) -> str:
    return "".join(f" @{time:.2f}" for time in times_s)


class ZoomOracle:
    """A `PolicyModel` for one task of the needle world.

    It zooms along the task's path, wrong turns included, and answers what it
    then must have seen.

    Args:
        task: A task with its truth.
        chat_format: Writes its turns.
        zoom_frames: Frames in a zoom at the right rate, which shows every slot once.
        sparse: Share of its zooms that it tries at half the right rate; it does so only
            where that happens to show what it must see, so it is never wrong, but its
            example is a bad one to follow.
        seed: Draws those zooms, together with the task's id.
    """

    def __init__(
        self, task: Task, wire: ChatFormat, zoom_frames: int, *, half_rate_share: float = 0.0, seed: int = 0
    ) -> None:
        self.task, self.chat_format, self.zoom_frames = task, wire, zoom_frames
        truth: dict[str, Any] = dict(task.extra)
        if "path" not in truth:
            raise ValueError(
                f"task {task.task_id} has no truth to play from: is its manifest beside the task file?"
            )
        self.path = [(float(a), float(b)) for a, b in truth["path"]]
        self._borders = [(float(a), float(b)) for a, b in truth["borders"]]
        self.border_starts_s = [start for start, _ in self._borders]
        self.symbol, self.border = str(truth["symbol"]), str(truth["border"])
        rng = random.Random(f"{seed}/{task.task_id}")
        self.frames_per_zoom = [
            zoom_frames // 2
            if rng.random() < half_rate_share and self._enough(zoom, zoom_frames // 2)
            else zoom_frames
            for zoom in range(len(self.path))
        ]

    def _enough(self, zoom: int, frames: int) -> bool:
        """Whether `frames_per_zoom` frames show all that must be seen there to zoom on, or to answer."""
        start, end = self.path[zoom]
        times = [start + (end - start) * k / frames for k in range(frames)]
        inside = [
            (a, b) for a, b in (*self.path[zoom + 1 :], *self.task.evidence_spans) if start <= a and b <= end
        ]
        return all(any(a <= time < b for time in times) for a, b in inside)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> ExternalAction:
        text = self._turn_text(sum(message.role == "assistant" for message in prompt.messages))
        return ExternalAction(text, self.chat_format.encode_assistant(text))

    def _turn_text(self, turn: int) -> str:
        if turn < len(self.path):
            start, end = self.path[turn]
            return format_zoom_turn(
                self._think(turn, start), start, end, self.frames_per_zoom[turn] / (end - start)
            )
        counted = [start for start, _ in self.task.evidence_spans] if self.task.kind == "count" else []
        return format_answer_turn(self.border, self.symbol, self.task.answer, counted)

    def _think(self, turn: int, start_s: float) -> str:
        """Where the border is, as far as it has been seen, after what was missed before."""
        missed = f"{NOTHING_SEEN}; " if self.task.kind == "decoy" and turn == 1 else ""
        return missed + self._place(turn, start_s)

    def _place(self, turn: int, start_s: float) -> str:
        """Where to look next: at the border, or at the night that hides it."""
        if self.task.kind == "deep" and turn == 0:
            return f"night @{start_s:.2f}"
        return f"{self.border} border" + _at(self.border_starts_s)


class CorrectionOracle(ZoomOracle):
    """A `PolicyModel` for one task that goes on from turns that someone else took and that led to a wrong answer.

    From the frames shown so far it tells what was missed, says so, zooms there at the rate that
    shows everything, and answers once the evidence is there. It does not look again at what has
    been seen well enough: where nothing was wrong with the zooms, it answers at once.

    What it says was wrong, before it says where to look next:

    - `nothing; more frames`: the right place, with too few frames to show what happens there;
    - `disc @12.50; more frames`: the same, where some of what must be counted was seen;
    - `outside`: a place where there was nothing to be seen;
    - `nothing`: one of two places with the border, and it is the other.
    """

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> ExternalAction:
        text = self._next([frame.pts_s for frame in prompt.frames], _last_shown(prompt))
        return ExternalAction(text, self.chat_format.encode_assistant(text))

    def _next(self, times: Sequence[float], last: Sequence[float]) -> str:
        """What to say after frames at `times`, the `last` of them in the latest clip."""
        turn = next((turn for turn in range(len(self.path)) if not self._known(turn, times)), None)
        if turn is None or self._known(len(self.path) - 1, times):
            return self._turn_text(len(self.path))
        start, end = self.path[turn]
        think = self._wrong(turn, last) + self._place(turn, start)
        return format_zoom_turn(think, start, end, self.zoom_frames / (end - start))

    def _known(self, turn: int, times: Sequence[float]) -> bool:
        """Whether frames at `times` show what there is to be seen at this place of the path."""
        if turn == len(self.path) - 1:
            seen = all(_any_in(times, *event) for event in self.task.evidence_spans)
            # One that counts must know of every slot: a flash may hide between two frames.
            return seen and (self.task.kind != "count" or self._every_slot(turn, times))
        if self.task.kind == "deep":
            return _any_in(times, *self.path[-1])
        return self._every_slot(turn, times)

    def _every_slot(self, turn: int, times: Sequence[float]) -> bool:
        start, end = self.path[turn]
        edges = [start + (end - start) * k / self.zoom_frames for k in range(self.zoom_frames + 1)]
        return all(_any_in(times, *slot) for slot in pairwise(edges))

    def _wrong(self, turn: int, last: Sequence[float]) -> str:
        """What the latest clip lacked, as a beginning of the next thought."""
        (night, dawn), (start, end) = self.path[0], self.path[-1]
        if turn and self.task.kind == "deep" and (_any_in(last, night, start) or _any_in(last, end, dawn)):
            return ""  # a look at the night has found the border: that was no mistake
        if _any_in(last, *self.path[turn]):
            seen = [start for start, end in self.task.evidence_spans if _any_in(last, start, end)]
            found = f"{self.symbol}{_at(seen)}" if seen else NOTHING_SEEN
            return f"{found}; {TOO_FEW_FRAMES}; "
        decoys = [place for place in self._borders if place != self.path[-1]]
        return f"{NOTHING_SEEN}; " if any(_any_in(last, *place) for place in decoys) else f"{WRONG_SEGMENT}; "


def _any_in(times: Iterable[float], start_s: float, end_s: float) -> bool:
    return any(start_s <= time < end_s for time in times)


def _last_shown(prompt: Prompt) -> list[float]:
    """Times of the frames that came last."""
    shown = next((message.frames for message in reversed(prompt.messages) if message.frames), ())
    return [frame.pts_s for frame in shown]


class UniformOracle:
    """A `PolicyModel` for one task that answers at once, whether or not its frames show the answer.

    It says what they show; where they do not show the answer it can only be
    guessed, and what is learned from it is how often which answer is right.
    """

    def __init__(self, task: Task, wire: ChatFormat) -> None:
        self.task, self.chat_format = task, wire
        self.symbol, self.border = str(task.extra["symbol"]), str(task.extra["border"])

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> ExternalAction:
        times = [frame.pts_s for frame in prompt.frames]
        seen = [next((t for t in times if a <= t < b), None) for a, b in self.task.evidence_spans]
        shown = [time for time in seen if time is not None]
        counted = shown if self.task.kind == "count" else []
        symbol = self.symbol if shown else NOTHING_SEEN
        text = format_answer_turn(self.border, symbol, self.task.answer, counted)
        return ExternalAction(text, self.chat_format.encode_assistant(text))
