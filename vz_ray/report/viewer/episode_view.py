"""JSON of one episode and of one group for the front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from vz_ray.env.serialization import trajectory_from_dict
from vz_ray.env.trajectory import RejectedZoom, SampledAction, TokenContext, Trajectory, Turn
from vz_ray.monitoring import metric_names
from vz_ray.report.thumbnails import evenly_spaced
from vz_ray.report.timeline import timeline_length_s, timeline_zooms
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.token_texts import token_texts
from vz_ray.video.frame import ZoomRequest

Json = dict[str, Any]

MAX_TEXT_CHARS = 200_000
"""Maximum length of a turn, question or answer."""
MAX_TOKENS = 20_000
"""Maximum number of tokens of a turn that are listed one by one."""
MAX_FRAMES = 256
"""Maximum number of frames of an overview or zoom; more frames are downsampled evenly."""

MISMATCH_PREFIXES = ("mismatch/", "staleness/")
"""Prefixes of the metrics that compare engine and learner."""


def parse_trajectory(line: Json) -> Trajectory:
    """Return the trajectory of a log line.

    Raises:
        EpisodeParseError: The trajectory is invalid.
    """
    try:
        return trajectory_from_dict(line["trajectory"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise EpisodeParseError(f"invalid episode: {error!r}") from error


def episode_view(line: Json, tokenizer: Tokenizer | None, metrics: Mapping[str, float] | None) -> Json:
    """Return the view of one episode.

    Args:
        line: JSON object of the log line.
        tokenizer: Tokenizer of the run's model; None if it is not available.
        metrics: Metrics of the training step; None for evaluations.

    Raises:
        EpisodeParseError: The episode is invalid.
    """
    trajectory, task = parse_trajectory(line), line["task"]
    reward = trajectory.reward
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
        "attempt": trajectory.id.attempt,
        "status": trajectory.status.value,
        "answer": None if trajectory.answer is None else _cut(trajectory.answer),
        "error": trajectory.error,
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
        "worker": trajectory.worker,
        "seconds": trajectory.seconds,
        "chat_format": trajectory.chat_format,
        "versions": list(trajectory.weight_versions),
        "tokens": trajectory.num_tokens,
        "duration": timeline_length_s(trajectory, task["evidence_spans"]),
        "overview": _frames(trajectory.prompt, task["video"]),
        "turns": [_turn(turn, tokenizer, task["video"]) for turn in trajectory.turns],
        "zoomed": _bars(trajectory.turns),
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
        view["zoom"] = _zoom_json(turn.zoom, turn)
    elif isinstance(turn.zoom, RejectedZoom):
        requested = None if turn.zoom.requested is None else _zoom_json(turn.zoom.requested, turn)
        view["refused"] = {"kind": turn.zoom.kind.value, "message": turn.zoom.message, "requested": requested}
    if isinstance(turn.action, SampledAction):
        view["sampled"] = _sampled(turn.action, turn.text, tokenizer)
    return view


def _zoom_json(zoom: ZoomRequest, turn: Turn) -> Json:
    return {"start": zoom.start_s, "end": zoom.end_s, "fps": zoom.fps, "requested_fps": turn.requested_fps}


def _bars(turns: Sequence[Turn]) -> list[Json]:
    """Return the zooms on the timeline: valid zooms, and rejected zooms with a parsed request."""
    return [
        {**_zoom_json(zoom, turns[number - 1]), "turn": number, **({"refused": error} if error else {})}
        for number, zoom, error in timeline_zooms(turns)
    ]


def _sampled(action: SampledAction, text: str, tokenizer: Tokenizer | None) -> Json:
    count = len(action.token_ids)
    listed = count <= MAX_TOKENS
    return {
        "count": count,
        "ids": list(action.token_ids) if listed else None,
        "texts": token_texts(tokenizer, action.token_ids, text) if listed else None,
        "logprobs": list(action.logprobs) if listed else None,
        "versions": [[span.start, span.end, span.version] for span in action.versions],
        "stop": action.stop_reason,
        "temperature": action.sampling_params.temperature,
        "top_p": action.sampling_params.top_p,
        "seed": action.sampling_params.seed,
        "max_tokens": action.sampling_params.max_tokens,
    }


def _frames(context: TokenContext, video: str) -> Json:
    """Return times and size of the frames; the time of an image from another file is None."""
    refs = evenly_spaced(context.frame_refs, MAX_FRAMES)
    return {
        "count": len(context.frame_refs),
        "times": [ref.pts_s if ref.uri == video else None for ref in refs],
        "width": refs[0].width if refs else 0,
        "height": refs[0].height if refs else 0,
    }


def group_view(lines: Sequence[tuple[Json, Json]]) -> Json:
    """Return the view of a group: all samples on one timeline.

    Args:
        lines: Index row and JSON object of each sample.

    Raises:
        EpisodeParseError: A sample is invalid.
    """
    trajectories = [parse_trajectory(line) for _, line in lines]
    task = lines[0][1]["task"]
    samples = [
        {**row, "zoomed": _bars(trajectory.turns)} for (row, _), trajectory in zip(lines, trajectories, strict=True)
    ]
    return {
        "task": {
            "question": _cut(task["question"]),
            "answer": _cut(task["answer"]),
            "events": task["evidence_spans"],
        },
        "duration": max(timeline_length_s(trajectory, task["evidence_spans"]) for trajectory in trajectories),
        "ticks": [time for time in _frames(trajectories[0].prompt, task["video"])["times"] if time is not None],
        "samples": samples,
    }


def _cut(text: str) -> Json:
    """Return the text, cut to the maximum, and its full length."""
    return {"text": text[:MAX_TEXT_CHARS], "length": len(text)}
