"""Contract check of a user's reward function: `vz-ray check-reward package.module:name`.

`vz_ray/rewards/user_function.py` defines the contract. The check scores each sample episode twice, then all
again in several threads, like rollout workers. Results must be valid and identical, arguments unchanged.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    RewardParts,
    TokenContext,
    Trajectory,
    Turn,
)
from vz_ray.env.zoom_call import extract_answer, parse_turn
from vz_ray.rewards.scorer import score_episode
from vz_ray.rewards.user_function import load_reward_function
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameRef, ZoomRequest

NUM_THREADS = 4
_DURATION_S = 60.0
_ZOOM = '<think>Closer.</think><video_zoom>{"segment": [12, 16], "fps": 2}</video_zoom>'
_REVERSED_ZOOM = '<think>Closer.</think><video_zoom>{"segment": [16, 12], "fps": 2}</video_zoom>'
_CHOICE = Task("choice", "v.mp4", "What flashes? A. disc B. cross", "B", evidence_spans=((13.0, 14.5),))
_COUNT = Task("count", "v.mp4", "How often does it flash?", "3", AnswerType.NUMBER)
_OPEN = Task("open", "v.mp4", "What does the cook do next?", "She adds salt.", AnswerType.OPEN_ENDED)

Case = tuple[str, Trajectory, Task]
"""Name, trajectory and task.."""


@dataclass(frozen=True, slots=True)
class RewardTrial:
    """Result of one sample episode.

    Attributes:
        name: Name of the case.
        parts: Reward including the function's parts; None if scoring failed.
        seconds: Duration of one call.
        violation: Violation of the contract; empty if there was no violation.
    """

    name: str
    parts: RewardParts | None
    seconds: float
    violation: str


def _frames(times: Iterable[float]) -> TokenContext:
    refs = tuple(FrameRef("blake3:0", "v.mp4", 0, t, 56, 56, "bicubic", "av", "00") for t in times)
    return TokenContext((7,) * len(refs), ((1, 4, 4),) * len(refs), refs, pad_id=7, merge_size=2)


def _turn(text: str) -> Turn:
    """Build the turn for `text`, including the frames of a valid zoom."""
    zoom = parse_turn(text, duration_s=_DURATION_S, max_frames=16).zoom
    reply = None
    if isinstance(zoom, ZoomRequest):
        reply = _frames(zoom.start_s + k / zoom.fps for k in range(zoom.num_frames))
    elif isinstance(zoom, RejectedZoom):
        reply = TokenContext((1, 2, 3))
    return Turn(ExternalAction(text, tuple(range(len(text) // 4))), text, zoom, reply)


def _case(name: str, task: Task, *texts: str, status: EpisodeStatus = EpisodeStatus.ANSWERED) -> Case:
    answer = extract_answer(texts[-1]) if status is EpisodeStatus.ANSWERED else None
    turns = tuple(map(_turn, texts))
    overview = _frames(range(0, 60, 4))
    trajectory = Trajectory(EpisodeId(0, task.task_id, 0), "clean", overview, turns, status, answer, seconds=1.0)
    return name, trajectory, task


def make_cases() -> list[Case]:
    """Return one sample episode of each kind that a reward function receives."""
    right, wrong = ("<think>Seen.</think><answer>B</answer>", "<think>Seen.</think><answer>A</answer>")
    return [
        _case("right, after a zoom", _CHOICE, _ZOOM, right),
        _case("right, without a zoom", _CHOICE, right),
        _case("right, after an invalid call", _CHOICE, _REVERSED_ZOOM, _ZOOM, right),
        _case("wrong, after a zoom", _CHOICE, _ZOOM, wrong),
        _case("unparsable answer", _CHOICE, "<think>Seen.</think><answer>A or B</answer>"),
        _case("no answer", _CHOICE, _ZOOM, "<think>Hm.</think>", status=EpisodeStatus.NO_ANSWER),
        _case("truncated", _CHOICE, "<think>So then", status=EpisodeStatus.TRUNCATED),
        _case("a number", _COUNT, "<think>Three.</think><answer>three times</answer>"),
        _case("open-ended, no judge", _OPEN, "<think>Salt.</think><answer>salts it</answer>"),
    ]


def check_function(path: str, episodes: Iterable[tuple[Trajectory, Task]] = ()) -> list[RewardTrial]:
    """Score the sample episodes and `episodes` with the function at `path`.

    Raises:
        UserError: The function does not exist or does not take three arguments.
    """
    load_reward_function(path)
    all_cases = [*make_cases(), *((str(episode.id), episode, task) for episode, task in episodes)]
    config = RewardConfig(function=path)
    trials = [_run_trial(case, config) for case in all_cases]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        threaded_results = list(pool.map(lambda case: _score_case(case, config), all_cases))
    return [
        trial
        if trial.violation or parts == trial.parts
        else RewardTrial(trial.name, trial.parts, trial.seconds, "returned another result in a thread")
        for trial, (parts, _) in zip(trials, threaded_results, strict=True)
    ]


def _score_case(case: Case, config: RewardConfig) -> tuple[RewardParts | None, str]:
    _, trajectory, task = case
    try:
        return score_episode(trajectory, task, config), ""
    except UserError as error:
        return None, str(error)


def _run_trial(case: Case, config: RewardConfig) -> RewardTrial:
    name = case[0]
    before = copy.deepcopy(case)
    start_s = time.perf_counter()
    parts, violation = _score_case(case, config)
    seconds = time.perf_counter() - start_s
    if not violation and case != before:
        violation = "changed the episode or the task"
    if not violation and _score_case(before, config)[0] != parts:
        violation = "returned another result for the same episode"
    return RewardTrial(name, parts, seconds, violation)


def print_trials(path: str, trials: Sequence[RewardTrial]) -> bool:
    """Print the reward and the violation of each episode; return whether the function keeps the contract."""
    console = Console(highlight=False)
    table = Table("episode", "accuracy", "extra parts", "total", "ms", box=None)
    for trial in trials:
        parts = trial.parts
        if parts is not None and parts.valid:
            extra_parts = ", ".join(f"{name} {value:g}" for name, value in parts.extra.items())
            cells = (f"{parts.accuracy:g}", extra_parts, f"{parts.total:g}")
        else:
            cells = ("-", f"invalid: {parts.note}" if parts else "violation", "-")
        table.add_row(*map(escape, (trial.name, *cells)), f"{1000 * trial.seconds:.1f}")
    console.print(table)
    violations = [trial for trial in trials if trial.violation]
    for trial in violations:
        console.print(f"{trial.name}: {trial.violation}", markup=False)
    summary = f"{len(violations)} of {len(trials)} episodes break the contract"
    console.print(f"{path}: {summary if violations else 'keeps the contract'}", markup=False)
    return not violations
