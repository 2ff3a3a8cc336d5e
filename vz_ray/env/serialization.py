"""Trajectories as JSON: exact, versioned, compact.

Round trip: `trajectory_from_dict(json.loads(json.dumps(trajectory_to_dict(t)))) == t`,
where `extra` holds JSON values only. What repeats is written once: a run of
equal token ids as `[id, count]` (an image is one pad many times over), and what
the frames of an episode share in a table that each frame points into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.video.frame import FrameRef, ZoomRequest

FORMAT_VERSION = 2

Json = dict[str, Any]
_SHARED = ("video_id", "uri", "stream", "width", "height", "scaler", "decoder")
_Table = list[list[Any]]


def _pack(ids: Sequence[int]) -> list[Any]:
    """`[5, 7, 7, 7]` as `[5, [7, 3]]`."""
    packed: list[Any] = []
    for value, run in groupby(ids):
        count = len(list(run))
        packed += [value] * count if count < 3 else [[value, count]]
    return packed


def _unpack(packed: Sequence[Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for item in packed:
        ids += [item[0]] * item[1] if isinstance(item, list) else [item]
    return tuple(ids)


def _ref_to_list(ref: FrameRef, shared: _Table) -> list[Any]:
    row = [getattr(ref, name) for name in _SHARED]
    if row not in shared:
        shared.append(row)
    return [shared.index(row), ref.pts_s, ref.digest]


def _ref_from_list(item: Sequence[Any], shared: _Table) -> FrameRef:
    index, pts_s, digest = item
    return FrameRef(**dict(zip(_SHARED, shared[index], strict=True)), pts_s=pts_s, digest=digest)


def _context_to_dict(context: TokenContext, shared: _Table) -> Json:
    return {
        "compact": _pack(context.compact_ids),
        "pad": context.pad_id,
        "grids": [list(grid) for grid in context.grids],
        "refs": [_ref_to_list(ref, shared) for ref in context.frame_refs],
    }


def _context_from_dict(data: Json, shared: _Table) -> TokenContext:
    return TokenContext(
        compact_ids=_unpack(data["compact"]),
        grids=tuple((t, h, w) for t, h, w in data["grids"]),
        frame_refs=tuple(_ref_from_list(item, shared) for item in data["refs"]),
        pad_id=data["pad"],
    )


def _action_to_dict(action: SampledAction | ExternalAction) -> Json:
    if isinstance(action, ExternalAction):
        return {"by": "written", "text": action.text, "ids": _pack(action.token_ids)}
    return {
        "by": "sampled",
        "ids": _pack(action.token_ids),
        "logprobs": list(action.logprobs),
        "versions": [[span.start, span.end, span.version] for span in action.versions],
        "sampling": asdict(action.sampling_params),
        "stop": action.stop_reason,
    }


def _action_from_dict(data: Json) -> SampledAction | ExternalAction:
    if data["by"] == "written":
        return ExternalAction(text=data["text"], token_ids=_unpack(data["ids"]))
    return SampledAction(
        token_ids=_unpack(data["ids"]),
        logprobs=tuple(data["logprobs"]),
        versions=tuple(VersionSpan(*span) for span in data["versions"]),
        sampling_params=SamplingParams(**data["sampling"]),
        stop_reason=data["stop"],
    )


def _zoom_to_dict(zoom: ZoomRequest | RejectedZoom | None) -> Json | None:
    if isinstance(zoom, RejectedZoom):
        refused = {"fault": zoom.kind.value, "message": zoom.message}
        return refused if zoom.requested is None else {**refused, "asked": _zoom_to_dict(zoom.requested)}
    if zoom is None:
        return None
    data = asdict(zoom)
    return data if zoom.video else {name: value for name, value in data.items() if name != "video"}


def _zoom_from_dict(data: Json | None) -> ZoomRequest | RejectedZoom | None:
    if data is None:
        return None
    if "fault" in data:
        # Refusals were once written without what was asked for.
        asked = data.get("asked")
        return RejectedZoom(
            ZoomErrorKind(data["fault"]), data["message"], ZoomRequest(**asked) if asked else None
        )
    return ZoomRequest(**data)


def _turn_to_dict(turn: Turn, shared: _Table) -> Json:
    return {
        "action": _action_to_dict(turn.action),
        "text": turn.text,
        "zoom": _zoom_to_dict(turn.zoom),
        "reply": None if turn.observation is None else _context_to_dict(turn.observation, shared),
        "seconds": list(turn.seconds),
        **({} if turn.requested_fps is None else {"asked_fps": turn.requested_fps}),
    }


def _turn_from_dict(data: Json, shared: _Table) -> Turn:
    sample_s, clip_s = data["seconds"]
    return Turn(
        action=_action_from_dict(data["action"]),
        text=data["text"],
        zoom=_zoom_from_dict(data["zoom"]),
        observation=None if data["reply"] is None else _context_from_dict(data["reply"], shared),
        seconds=(sample_s, clip_s),
        requested_fps=data.get("asked_fps"),
    )


def trajectory_to_dict(trajectory: Trajectory) -> Json:
    """`trajectory` as JSON values."""
    shared: _Table = []
    return {
        "v": FORMAT_VERSION,
        "id": asdict(trajectory.id),
        "wire": trajectory.chat_format,
        "prompt": _context_to_dict(trajectory.prompt, shared),
        "turns": [_turn_to_dict(turn, shared) for turn in trajectory.turns],
        "frames_of": shared,
        "status": trajectory.status.value,
        "answer": trajectory.answer,
        "worker": trajectory.worker,
        "seconds": trajectory.seconds,
        "reward": None if trajectory.reward is None else asdict(trajectory.reward),
        "error": trajectory.error,
        "extra": trajectory.extra,
    }


def trajectory_from_dict(data: Json) -> Trajectory:
    """The trajectory that `trajectory_to_dict` wrote.

    Raises:
        ValueError: Written by another version of this format.
    """
    if data.get("v") != FORMAT_VERSION:
        raise ValueError(
            f"trajectory of format version {data.get('v')!r}; this code reads version {FORMAT_VERSION}"
        )
    shared = data["frames_of"]
    return Trajectory(
        id=EpisodeId(**data["id"]),
        chat_format=data["wire"],
        prompt=_context_from_dict(data["prompt"], shared),
        turns=tuple(_turn_from_dict(turn, shared) for turn in data["turns"]),
        status=EpisodeStatus(data["status"]),
        answer=data["answer"],
        worker=data["worker"],
        seconds=data["seconds"],
        reward=None if data["reward"] is None else RewardParts(**data["reward"]),
        error=data["error"],
        extra=data["extra"],
    )
