"""Scripted episodes on a real engine, so that every schedule has exactly the same work.

The engine computes each token as usual, then a logits processor forces the script's token: the scripted number
of tokens, a zoom call or an answer. Parsing, clips, observations and prefix caches are the product's.
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
"""Period of the benchmark's videos."""
ZOOM_FPS, MAX_START_S = 2.0, 44.0
FORCED = "forced_token_ids"


def scripted_zoom(task: int, sample: int, turn: int, frames: int) -> ZoomRequest:
    """Return the zoom of a turn; the samples of a task use two different segments per turn."""
    rng = random.Random(f"{task}/{turn}/{sample % 2}")
    start = rng.randrange(int(MAX_START_S * ZOOM_FPS)) / ZOOM_FPS
    return ZoomRequest(start, start + frames / ZOOM_FPS, ZOOM_FPS)


def scripted_turn(task: int, sample: int, turn: int, shape: dict[str, Any]) -> tuple[str, str, int]:
    """Return the start, the end and the minimum number of tokens of a turn."""
    clips = shape["clip_frames"]
    if turn < len(clips):
        zoom = scripted_zoom(task, sample, turn, clips[turn])
        call = json.dumps({"segment": [zoom.start_s, zoom.end_s], "fps": 2})
        return "<think>", f"</think><video_zoom>{call}</video_zoom>", shape["turn_tokens"][turn]
    return "<think>", "</think><answer>A</answer>", shape["turn_tokens"][turn]


class ForcedTokens(AdapterLogitsProcessor):
    """Logits processor that forces the next token of the script."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: VllmSamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED)
        return partial(_force_token, forced) if forced else None


def _force_token(forced: Sequence[int], sampled: list[int], logits: torch.Tensor) -> torch.Tensor:
    token_id = forced[min(len(sampled), len(forced) - 1)]
    logits.fill_(float("-inf"))
    logits[token_id] = 0.0
    return logits


class ScriptedEngine(VllmEngine):
    """Engine with a script for every turn."""

    extra_logits_processors: ClassVar[Sequence[type]] = (ForcedTokens,)
    script: Callable[[str], Sequence[int]]

    async def _generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> Any:
        params.extra_args = {FORCED: list(self.script(request_id))}
        return await super()._generate(prompt, params, request_id, **options)


@dataclass
class RecordedClips:
    """Frame source with all clips in memory.

    Attributes:
        info: Video info by URI.
        clips: Clips by URI and request.
        clip_ms: Latencies of the mode `latency`, in milliseconds.
        pool: Decode pool of the mode `decode`.
        mode: `memory` returns at once, `latency` sleeps first, `decode` waits for the pool first.
        minute: Offset of decoded segments; each run decodes new frames with the same work.
    """

    info: dict[str, VideoInfo]
    clips: dict[tuple[str, OverviewRequest | ZoomRequest], Clip]
    clip_ms: Sequence[float]
    pool: DecodePool
    mode: str = "memory"
    minute: int = 0

    async def probe(self, uri: str) -> VideoInfo:
        return self.info[uri]

    async def clip(self, uri: str, request: Any, size: FrameSize) -> Clip:
        if not isinstance(request, ZoomRequest):
            return self.clips[uri, request]
        if self.mode == "latency":
            # Seeded by the request, so that all schedules have the same latencies.
            rng = random.Random(f"{uri}/{request.start_s}/{request.num_frames}")
            await asyncio.sleep(rng.choice(self.clip_ms) / 1e3)
        elif self.mode == "decode":
            await self.pool.clip(uri, shift_zoom(request, self.minute), size)
        return self.clips[uri, request]

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        frames = {frame.ref: frame for clip in self.clips.values() for frame in clip.frames}
        return [frames[ref] for ref in refs]


def shift_zoom(request: ZoomRequest, minutes: int) -> ZoomRequest:
    offset_s = minutes * MINUTE_S
    return replace(request, start_s=request.start_s + offset_s, end_s=request.end_s + offset_s)


class ScriptedWorker(RolloutWorkerActor):
    """Rollout worker with a script and with the schedules of the baselines."""

    engine_type: ClassVar[type[VllmEngine]] = ScriptedEngine

    async def set_script(self, workload: Workload, group_size: int) -> None:
        """Install the script of the workload in the engine."""
        engine = self._engine
        assert isinstance(engine, ScriptedEngine)
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        [filler] = encode("0")
        end_id = self._tokenizer.convert_tokens_to_ids("<|im_end|>")

        def script(request_id: str) -> list[int]:
            _, task, suffix = request_id.split("/", 2)
            sample, turn = int(suffix.split("#")[0]), int(suffix.partition("/turn")[2])
            shape = workload.shape(int(task), sample, group_size)
            start, end, tokens = scripted_turn(int(task), sample, turn, shape)
            first, last = encode(start), [*encode(end), *([] if end.endswith("zoom>") else [end_id])]
            return [*first, *[filler] * max(0, tokens - len(first) - len(last)), *last]

        engine.script = script

    async def reset(self, mode: str, minute: int) -> None:
        """Clear the caches and set the mode of the clips."""
        assert self._engine is not None
        await self._engine.reset_caches()
        clips = self._setup.frame_source
        assert isinstance(clips, RecordedClips)
        clips.mode, clips.minute = mode, minute

    async def run_shard(
        self, episodes: Sequence[tuple[Task, EpisodeId]], sampling_params: SamplingParams
    ) -> list[Trajectory]:
        """Run all episodes independently, up to the maximum concurrency."""
        calls = (self.run_episode(task, episode_id, sampling_params) for task, episode_id in episodes)
        return list(await asyncio.gather(*calls))

    async def run_lockstep(
        self, episodes: Sequence[tuple[Task, EpisodeId]], sampling_params: SamplingParams, batch_size: int
    ) -> list[Trajectory]:
        """Run batches of episodes in rounds: all turns, then all clips, then the next round."""
        trajectories: list[Trajectory] = []
        for start in range(0, len(episodes), batch_size):
            batch = episodes[start : start + batch_size]
            envs = await asyncio.gather(*(self._start_env(task, episode_id) for task, episode_id in batch))
            while active := [env for env in envs if env.state is not EnvState.DONE]:
                zooms = await asyncio.gather(*(self._run_turn(env, sampling_params) for env in active))
                requests = [(env, zoom) for env, zoom in zip(active, zooms, strict=True) if zoom is not None]
                await asyncio.gather(*(self._add_clip(env, zoom) for env, zoom in requests))
            for (task, _), env in zip(batch, envs, strict=True):
                trajectory = env.trajectory(worker=self.name)
                reward = await asyncio.to_thread(self._setup.scorer, trajectory, task, self._setup.reward)
                trajectories.append(replace(trajectory, reward=reward))
        return trajectories

    async def _start_env(self, task: Task, episode_id: EpisodeId) -> ZoomEnv:
        config, source = self._setup.episode, self._setup.frame_source
        video = await source.probe(task.video)
        env = ZoomEnv(episode_id, task, video, self._chat_format(config), config)
        env.start(await source.clip(task.video, env.overview_request, frame_size(config)))
        return env

    async def _run_turn(self, env: ZoomEnv, sampling_params: SamplingParams) -> ZoomRequest | None:
        assert self._engine is not None
        action = await self._engine.generate(
            env.prompt,
            env.turn_sampling_params(sampling_params),
            request_id=f"{env.id}/turn{len(env.turns)}",
        )
        return env.step(action)

    async def _add_clip(self, env: ZoomEnv, zoom: ZoomRequest) -> None:
        size = frame_size(self._setup.episode)
        env.add_clip(await self._setup.frame_source.clip(env.task.video, zoom, size))


class ScriptedWorkerClient(RayWorkerClient):
    """Driver-side client of a `ScriptedWorker`."""

    actor_type: ClassVar[type[RolloutWorkerActor]] = ScriptedWorker

    def call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        return self._call(method, *arguments)


def frame_size(config: Any) -> FrameSize:
    return FrameSize(config.min_pixels, config.max_pixels, factor=28)
