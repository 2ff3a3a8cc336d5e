"""What a browser is told of one episode, and of a group of them: JSON values from trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from vz_ray.env.serialization import trajectory_from_dict
from vz_ray.env.trajectory import RejectedZoom, SampledAction, TokenContext, Trajectory, Turn
from vz_ray.monitoring import metric_names
from vz_ray.report.timeline import timeline_length_s
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.token_texts import token_texts
from vz_ray.video.frame import ZoomRequest

Json = dict[str, Any]

MAX_TEXT_CHARS = 200_000
"""Characters of a turn, question or answer that are shown."""
MAX_TOKENS = 20_000
"""Tokens of a turn that are shown one by one."""
MAX_FRAMES = 256
"""Frames of the overview or a zoom that are shown; more are thinned evenly."""

MISMATCH_PREFIXES = ("mismatch/", "staleness/")
"""Prefixes of the metrics that compare engine and learner."""


def parse_trajectory(line: Json) -> Trajectory:
    """The trajectory of a line.

    Raises:
        NoEpisode: It is broken beyond what lists need of it.
    """
    try:
        return trajectory_from_dict(line["trajectory"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise EpisodeParseError(f"the episode cannot be read: {error!r}") from error


def episode_view(line: Json, tokenizer: Tokenizer | None, metrics: Mapping[str, float] | None) -> Json:
    """One episode.

    Args:
        line: As logged.
        tokenizer: Of the run's model, if it was found.
        metrics: Of its training iteration, if it has one.

    Raises:
        NoEpisode: It cannot be read.
    """
    played, task = parse_trajectory(line), line["task"]
    reward = played.reward
    return {
        "task": {
            "id": task["task_id"],
            "question": _cut(task["question"]),
            "answer": _cut(task["answer"]),
            "answer_type": task["answer_type"],
            "source": task["source"],
            "kind": task["kind"],
            "video": task["video"],
            "events": task["evidence_spans"],
        },
        "attempt": played.id.attempt,
        "status": played.status.value,
        "answer": None if played.answer is None else _cut(played.answer),
        "error": played.error,
        "reward": None
        if reward is None
        else {
            "total": reward.total,
            "parts": {
                "accuracy": reward.accuracy,
                "format": reward.format,
                "tool": reward.tool,
                **reward.extra,
            },
            "valid": reward.valid,
            "note": reward.note,
        },
        "advantage": line["advantage"],
        "worker": played.worker,
        "seconds": played.seconds,
        "wire": played.chat_format,
        "versions": list(played.weight_versions),
        "tokens": played.num_tokens,
        "duration": timeline_length_s(played, task["evidence_spans"]),
        "overview": _frames(played.prompt, task["video"]),
        "turns": [_turn(turn, tokenizer, task["video"]) for turn in played.turns],
        "zoomed": _bars(played.turns),
        "mismatch": {k: v for k, v in (metrics or {}).items() if k.startswith(MISMATCH_PREFIXES)},
        "names": {"max": metric_names.MISMATCH_LOGPROB_MAX, "kl": metric_names.MISMATCH_KL},
    }


def _turn(turn: Turn, tokenizer: Tokenizer | None, video: str) -> Json:
    view: Json = {
        "text": _cut(turn.text),
        "zoom": None,
        "refused": None,
        "frames": _frames(turn.observation, video) if turn.observation else None,
        "reply_tokens": turn.observation.num_tokens if turn.observation else 0,
        "seconds": list(turn.seconds),
        "sampled": None,
    }
    if isinstance(turn.zoom, ZoomRequest):
        view["zoom"] = _asked(turn.zoom, turn)
    elif isinstance(turn.zoom, RejectedZoom):
        asked = None if turn.zoom.requested is None else _asked(turn.zoom.requested, turn)
        view["refused"] = {"fault": turn.zoom.kind.value, "message": turn.zoom.message, "asked": asked}
    if isinstance(turn.action, SampledAction):
        view["sampled"] = _sampled(turn.action, turn.text, tokenizer)
    return view


def _asked(zoom: ZoomRequest, turn: Turn) -> Json:
    return {"start": zoom.start_s, "end": zoom.end_s, "fps": zoom.fps, "asked_fps": turn.requested_fps}


def _bars(turns: Sequence[Turn]) -> list[Json]:
    """What is drawn of zooms on a timeline: those carried out, and those refused whose call could be read."""
    bars = []
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn.zoom, ZoomRequest):
            bars.append({**_asked(turn.zoom, turn), "turn": number})
        elif turn.zoom is not None and turn.zoom.requested is not None:
            refused = turn.zoom.message
            bars.append({**_asked(turn.zoom.requested, turn), "turn": number, "refused": refused})
    return bars


def _sampled(action: SampledAction, said: str, tokenizer: Tokenizer | None) -> Json:
    count = len(action.token_ids)
    shown = count <= MAX_TOKENS
    return {
        "count": count,
        "ids": list(action.token_ids) if shown else None,
        "texts": token_texts(tokenizer, action.token_ids, said) if shown else None,
        "logprobs": list(action.logprobs) if shown else None,
        "versions": [[span.start, span.end, span.version] for span in action.versions],
        "stop": action.stop_reason,
        "temperature": action.sampling_params.temperature,
        "top_p": action.sampling_params.top_p,
        "seed": action.sampling_params.seed,
        "max_tokens": action.sampling_params.max_tokens,
    }


def shown_ref_indices(context: TokenContext) -> list[int]:
    """Which of a context's frames are shown: all, or `MAX_FRAMES` spread evenly."""
    count = len(context.frame_refs)
    return list(range(count)) if count <= MAX_FRAMES else [k * count // MAX_FRAMES for k in range(MAX_FRAMES)]


def _frames(context: TokenContext, video: str) -> Json:
    """Times and size; None for a picture that belongs to the question, which is of another file."""
    refs = [context.frame_refs[k] for k in shown_ref_indices(context)]
    return {
        "count": len(context.frame_refs),
        "times": [ref.pts_s if ref.uri == video else None for ref in refs],
        "width": refs[0].width if refs else 0,
        "height": refs[0].height if refs else 0,
    }


def group_view(lines: Sequence[tuple[Json, Json]]) -> Json:
    """The samples of a group on one timeline.

    Args:
        lines: Of each sample, its row of the index and its line.

    Raises:
        NoEpisode: One of them cannot be read.
    """
    played = [parse_trajectory(line) for _, line in lines]
    task = lines[0][1]["task"]
    samples = [
        {
            **row,
            "zoomed": _bars(one.turns),
        }
        for (row, _), one in zip(lines, played, strict=True)
    ]
    return {
        "task": {
            "question": _cut(task["question"]),
            "answer": _cut(task["answer"]),
            "events": task["evidence_spans"],
        },
        "duration": max(timeline_length_s(one, task["evidence_spans"]) for one in played),
        "ticks": [time for time in _frames(played[0].prompt, task["video"])["times"] if time is not None],
        "samples": samples,
    }


def _cut(text: str) -> Json:
    """As much of a text as is shown, and how many characters it has."""
    return {"text": text[:MAX_TEXT_CHARS], "length": len(text)}
