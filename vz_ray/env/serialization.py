"""JSON serialization of trajectories: exact, versioned, compact.

Round trip: `trajectory_from_dict(json.loads(json.dumps(trajectory_to_dict(t)))) == t`, if `extra` holds
only JSON values. Repetitions are stored once: a run of equal token ids as `[id, count]`, and the common
fields of an episode's frames in a table that each frame refers to by index.
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

FORMAT_VERSION = 3

Json = dict[str, Any]
_SHARED = ("video_id", "uri", "stream", "width", "height", "scaler", "decoder")
_Table = list[list[Any]]
_QWEN2_5_VL_MERGE_SIZE = 2
"""Merge size of records without one: they were all written with Qwen2.5-VL."""


def _pack(ids: Sequence[int]) -> list[Any]:
    """Run-length encode ids: `[5, 7, 7, 7]` becomes `[5, [7, 3]]`."""
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
        **({"merge": context.merge_size} if context.merge_size else {}),
    }


def _context_from_dict(data: Json, shared: _Table) -> TokenContext:
    return TokenContext(
        compact_ids=_unpack(data["compact"]),
        grids=tuple((t, h, w) for t, h, w in data["grids"]),
        frame_refs=tuple(_ref_from_list(item, shared) for item in data["refs"]),
        pad_id=data["pad"],
        merge_size=data.get("merge", _QWEN2_5_VL_MERGE_SIZE if data["grids"] else 0),
    )


def _action_to_dict(action: SampledAction | ExternalAction) -> Json:
    if isinstance(action, ExternalAction):
        return {"by": "external", "text": action.text, "ids": _pack(action.token_ids)}
    return {
        "by": "sampled",
        "ids": _pack(action.token_ids),
        "logprobs": list(action.logprobs),
        "versions": [[span.start, span.end, span.version] for span in action.versions],
        "sampling_params": asdict(action.sampling_params),
        "stop_reason": action.stop_reason,
    }


def _action_from_dict(data: Json) -> SampledAction | ExternalAction:
    if data["by"] == "external":
        return ExternalAction(text=data["text"], token_ids=_unpack(data["ids"]))
    return SampledAction(
        token_ids=_unpack(data["ids"]),
        logprobs=tuple(data["logprobs"]),
        versions=tuple(VersionSpan(*span) for span in data["versions"]),
        sampling_params=SamplingParams(**data["sampling_params"]),
        stop_reason=data["stop_reason"],
    )


def _zoom_to_dict(zoom: ZoomRequest | RejectedZoom | None) -> Json | None:
    if isinstance(zoom, RejectedZoom):
        rejected = {"error": zoom.kind.value, "message": zoom.message}
        return rejected if zoom.requested is None else {**rejected, "requested": _zoom_to_dict(zoom.requested)}
    if zoom is None:
        return None
    data = asdict(zoom)
    return data if zoom.video else {name: value for name, value in data.items() if name != "video"}


def _zoom_from_dict(data: Json | None) -> ZoomRequest | RejectedZoom | None:
    if data is None:
        return None
    if "error" in data:
        requested = data.get("requested")
        return RejectedZoom(
            ZoomErrorKind(data["error"]), data["message"], ZoomRequest(**requested) if requested else None
        )
    return ZoomRequest(**data)


def _turn_to_dict(turn: Turn, shared: _Table) -> Json:
    return {
        "action": _action_to_dict(turn.action),
        "text": turn.text,
        "zoom": _zoom_to_dict(turn.zoom),
        "observation": None if turn.observation is None else _context_to_dict(turn.observation, shared),
        "seconds": list(turn.seconds),
        **({} if turn.requested_fps is None else {"requested_fps": turn.requested_fps}),
    }


def _turn_from_dict(data: Json, shared: _Table) -> Turn:
    sample_s, clip_s = data["seconds"]
    observation = data["observation"]
    return Turn(
        action=_action_from_dict(data["action"]),
        text=data["text"],
        zoom=_zoom_from_dict(data["zoom"]),
        observation=None if observation is None else _context_from_dict(observation, shared),
        seconds=(sample_s, clip_s),
        requested_fps=data.get("requested_fps"),
    )


def _reward_to_dict(reward: RewardParts) -> Json:
    data = {**asdict(reward), "turns": list(reward.turns)}
    if not reward.turns:
        del data["turns"]
    return data


def _reward_from_dict(data: Json) -> RewardParts:
    return RewardParts(**{**data, "turns": tuple(data.get("turns", ()))})


def trajectory_to_dict(trajectory: Trajectory) -> Json:
    """Convert a trajectory to JSON values."""
    shared: _Table = []
    return {
        "v": FORMAT_VERSION,
        "id": asdict(trajectory.id),
        "chat_format": trajectory.chat_format,
        "prompt": _context_to_dict(trajectory.prompt, shared),
        "turns": [_turn_to_dict(turn, shared) for turn in trajectory.turns],
        "frame_table": shared,
        "status": trajectory.status.value,
        "answer": trajectory.answer,
        "worker": trajectory.worker,
        "seconds": trajectory.seconds,
        "reward": None if trajectory.reward is None else _reward_to_dict(trajectory.reward),
        "error": trajectory.error,
        "extra": trajectory.extra,
        **({"teacher_logprobs": list(trajectory.teacher_logprobs)} if trajectory.teacher_logprobs else {}),
    }


def trajectory_from_dict(data: Json) -> Trajectory:
    """Restore a trajectory from `trajectory_to_dict`.

    Raises:
        ValueError: The format version is not supported.
    """
    if data.get("v") != FORMAT_VERSION:
        raise ValueError(f"trajectory of format version {data.get('v')!r}; this code reads version {FORMAT_VERSION}")
    shared = data["frame_table"]
    return Trajectory(
        id=EpisodeId(**data["id"]),
        chat_format=data["chat_format"],
        prompt=_context_from_dict(data["prompt"], shared),
        turns=tuple(_turn_from_dict(turn, shared) for turn in data["turns"]),
        status=EpisodeStatus(data["status"]),
        answer=data["answer"],
        worker=data["worker"],
        seconds=data["seconds"],
        reward=None if data["reward"] is None else _reward_from_dict(data["reward"]),
        error=data["error"],
        extra=data["extra"],
        teacher_logprobs=tuple(data.get("teacher_logprobs", ())),
    )
