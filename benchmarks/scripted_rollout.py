"""Episodes that a real engine plays by a script, so that every schedule has exactly the same work.

The engine computes each token as in any episode, and its sampler is then held to the script: so many tokens,
a zoom call, in the end an answer. What follows (parsing, clips, replies, prefix caches) is the product's.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from benchmarks.workload import Workload
from vz_ray.decode import DecodePool
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.env.zoom_env import EnvState, ZoomEnv
from vz_ray.rollout.ray_worker import RayWorkerClient, RolloutWorkerActor
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.video.frame import Clip, Frame, FrameRef, FrameSize, OverviewRequest, VideoInfo, ZoomRequest

MINUTE_S = 60.0
"""The benchmark's videos repeat themselves after it."""
FPS, PLACES = 2.0, 44.0
FORCED = "forced_token_ids"


def scripted_zoom(task: int, sample: int, turn: int, frames: int) -> ZoomRequest:
    """Samples of a task look at about the same places: every turn has two of them."""
    draw = random.Random(f"{task}/{turn}/{sample % 2}")
    start = draw.randrange(int(PLACES * FPS)) / FPS
    return ZoomRequest(start, start + frames / FPS, FPS)


def scripted_turn(task: int, sample: int, turn: int, shape: dict[str, Any]) -> tuple[str, str, int]:
    """What a turn begins and ends with, and its tokens in all, where that is enough for both."""
    clips = shape["clip_frames"]
    if turn < len(clips):
        zoom = scripted_zoom(task, sample, turn, clips[turn])
        call = json.dumps({"segment": [zoom.start_s, zoom.end_s], "fps": 2})
        return "<think>", f"</think><video_zoom>{call}</video_zoom>", shape["turn_tokens"][turn]
    return "<think>", "</think><answer>A</answer>", shape["turn_tokens"][turn]


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves the sampler no choice but the script's next token."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: VllmSamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED)
        return partial(_follow, forced) if forced else None


def _follow(forced: Sequence[int], sampled: list[int], logits: torch.Tensor) -> torch.Tensor:
    wanted = forced[min(len(sampled), len(forced) - 1)]
    logits.fill_(float("-inf"))
    logits[wanted] = 0.0
    return logits


class ScriptedEngine(VllmEngine):
    """The engine, with a script for every turn."""

    extra_logits_processors: ClassVar[Sequence[type]] = (ForcedTokens,)
    script: Callable[[str], Sequence[int]]

    async def _generate(self, prompt: Any, params: Any, request: str, **how: Any) -> Any:
        params.extra_args = {FORCED: list(self.script(request))}
        return await super()._generate(prompt, params, request, **how)


@dataclass
class RecordedClips:
    """A frame source that has every clip in memory, and gives it at once, after a while, or once decoded.

    Attributes:
        clips: By video and request.
        mode: `memory`, `latency` (sleeps) or `decode` (asks the pool, and waits for it).
        minute: Where decoding looks: each run at frames that none before it has decoded, with the same work.
    """

    info: dict[str, VideoInfo]
    clips: dict[tuple[str, OverviewRequest | ZoomRequest], Clip]
    clip_ms: Sequence[float]
    pool: DecodePool
    mode: str = "memory"
    minute: int = 0

    async def probe(self, uri: str) -> VideoInfo:
        return self.info[uri]

    async def overview(self, uri: str, request: OverviewRequest, size: FrameSize) -> Clip:
        return self.clips[uri, request]

    async def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        if self.mode == "latency":
            # The same for every schedule.
            draw = random.Random(f"{uri}/{request.start_s}/{request.num_frames}")
            await asyncio.sleep(draw.choice(self.clip_ms) / 1e3)
        elif self.mode == "decode":
            await self.pool.zoom(uri, shift_zoom(request, self.minute), size)
        return self.clips[uri, request]

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        here = {frame.ref: frame for clip in self.clips.values() for frame in clip.frames}
        return [here[ref] for ref in refs]


def shift_zoom(request: ZoomRequest, minutes: int) -> ZoomRequest:
    by = minutes * MINUTE_S
    return replace(request, start_s=request.start_s + by, end_s=request.end_s + by)


class ScriptedWorker(RolloutWorkerActor):
    """A rollout worker that can also play as others would schedule it."""

    engine_type: ClassVar[type[VllmEngine]] = ScriptedEngine

    async def set_script(self, workload: Workload, samples: int) -> None:
        """Takes the script."""
        engine = self._engine
        assert isinstance(engine, ScriptedEngine)
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        [filler] = encode("0")
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")

        def script(request: str) -> list[int]:
            _, task, rest = request.split("/", 2)
            sample, turn = int(rest.split("#")[0]), int(rest.partition("/turn")[2])
            begins, ends, tokens = scripted_turn(
                int(task), sample, turn, workload.shape(int(task), sample, samples)
            )
            first, last = encode(begins), [*encode(ends), *([] if ends.endswith("zoom>") else [end])]
            return [*first, *[filler] * max(0, tokens - len(first) - len(last)), *last]

        engine.script = script

    async def reset(self, mode: str, minute: int) -> None:
        """Empty caches, and clips that come as `mode` says."""
        assert self._engine is not None
        await self._engine.reset_caches()
        tape = self._setup.frame_source
        assert isinstance(tape, RecordedClips)
        tape.mode, tape.minute = mode, minute

    async def play_shard(
        self, games: Sequence[tuple[Task, EpisodeId]], sampling: SamplingParams
    ) -> list[Trajectory]:
        """Its part of the batch, each episode by itself, as many at once as there are places."""
        return list(await asyncio.gather(*(self.run_episode(task, id, sampling) for task, id in games)))

    async def play_rounds(
        self, games: Sequence[tuple[Task, EpisodeId]], sampling: SamplingParams, width: int
    ) -> list[Trajectory]:
        """Its part of the batch in lockstep, `width` episodes at a time.

        All take a turn; when the last has, all clips are fetched; when the last is there, the next round.
        """
        played: list[Trajectory] = []
        for some in _cut(games, width):
            episodes = await asyncio.gather(*(self._begin(task, id) for task, id in some))
            while active := [episode for episode in episodes if episode.state is not EnvState.DONE]:
                turns = await asyncio.gather(*(self._turn(episode, sampling) for episode in active))
                wanted = [(e, zoom) for e, zoom in zip(active, turns, strict=True) if zoom is not None]
                await asyncio.gather(*(self._look(episode, zoom) for episode, zoom in wanted))
            for (task, _), episode in zip(some, episodes, strict=True):
                trajectory = episode.trajectory(worker=self.name)
                parts = await asyncio.to_thread(self._setup.scorer, trajectory, task, self._setup.reward)
                played.append(replace(trajectory, reward=parts))
        return played

    async def _begin(self, task: Task, id: EpisodeId) -> ZoomEnv:
        rules, frames = self._setup.episode, self._setup.frame_source
        video = await frames.probe(task.video)
        episode = ZoomEnv(id, task, video, self._chat_format(rules), rules)
        episode.start(await frames.overview(task.video, episode.overview_request, frame_size(rules)))
        return episode

    async def _turn(self, episode: ZoomEnv, sampling: SamplingParams) -> ZoomRequest | None:
        assert self._engine is not None
        request = f"{episode.id}/turn{len(episode.turns)}"
        action = await self._engine.generate(
            episode.prompt, episode.turn_sampling_params(sampling), request_id=request
        )
        return episode.step(action)

    async def _look(self, episode: ZoomEnv, zoom: ZoomRequest) -> None:
        clip = await self._setup.frame_source.zoom(episode.task.video, zoom, frame_size(self._setup.episode))
        episode.add_clip(clip)


class ScriptedWorkerClient(RayWorkerClient):
    """How the driver reaches one."""

    actor_type: ClassVar[type[RolloutWorkerActor]] = ScriptedWorker

    def call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        return self._call(method, *arguments)


def frame_size(rules: Any) -> FrameSize:
    return FrameSize(rules.min_pixels, rules.max_pixels)


def _cut(games: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [games[at : at + width] for at in range(0, len(games), width)]
