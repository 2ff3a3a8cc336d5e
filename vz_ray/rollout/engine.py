"""One vLLM engine: samples turns token in, token out, and takes new weights.

The front end (request preprocessing, detokenising) runs in this process, the
model in a child process of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from vz_ray.config.rollout import EngineConfig
from vz_ray.episode.gate import Draft
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.trajectory import Sampled, Sampling, VersionSpan
from vz_ray.episode.wire import placeholder_ids
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.rollout.engine_args import engine_args, prepare_environment
from vz_ray.rollout.engine_stats import EngineGauge, EngineStats
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.weights import BACKENDS, Probe, Update

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ZOOM_END = "</video_zoom>"
"""A turn stops where a zoom call is complete."""
ANSWER_END = "</answer>"
"""A draft stops where its answer is complete."""
_LIKELIEST = 20
"""Tokens whose log-probs are told at each position of a draft; vLLM tells no more by default."""

_SENDS = 3
_LOOK_S = 1.0
"""Between two looks whether an engine that has not answered lives."""
_SHUTDOWN_S = 30.0

T = TypeVar("T")
Heard: TypeAlias = Callable[[str], None]
"""Is given all text of a turn so far, each time that there is more."""


class EngineFailed(RuntimeError):
    """The engine cannot go on: it must be replaced, and what it was doing done elsewhere."""


def banned_ids(model: str | Path) -> tuple[int, ...]:
    """Ids that are never sampled from the checkpoint `model`; the learner masks the same ones."""
    from transformers import AutoTokenizer

    return placeholder_ids(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False).get_vocab())


def frame_key(frame: Frame) -> str:
    """Identity of a frame in the engine's caches.

    The digest covers bytes only: a black frame of 28 x 56 and one of 56 x 28
    have the same, but not the same patches.
    """
    return f"{frame.ref.digest}-{frame.ref.width}x{frame.ref.height}"


class Engine:
    """A vLLM engine that plays one policy; a `Policy` in the sense of the episode runner.

    Example:
        engine = await Engine.start("model", EngineConfig(), name="rollout-0", log="rollout-0.log")
        turn = await engine.act(prompt, Sampling(temperature=1.0), request="0/q7/3#0:1")
        await engine.shutdown()
    """

    processors: ClassVar[Sequence[type]] = ()
    """Further logits processors of vLLM, after the ban."""

    def __init__(
        self,
        llm: AsyncLLM,
        *,
        name: str,
        banned: tuple[int, ...],
        pad_id: int,
        version: int,
        training: bool,
        deadline_s: float,
        gauge: EngineGauge,
    ) -> None:
        self.name, self.pulls = name, False
        self._training = training
        self._pad_id = pad_id
        self.banned = banned
        self.version = version
        self._running_llm: AsyncLLM | None = llm
        self._deadline_s = deadline_s
        self._open = asyncio.Event()
        self._open.set()
        self._stats, self._gauge = EngineStats(), gauge
        self._running = 0

    @classmethod
    async def start(
        cls,
        model: str | Path,
        config: EngineConfig,
        *,
        name: str,
        log: str | Path,
        version: int = 0,
        transport: str = "shm",
        training: bool = True,
        start_deadline_s: float = 600.0,
        turn_deadline_s: float = 300.0,
    ) -> Engine:
        """Starts an engine on the checkpoint directory `model`.

        Args:
            name: Who it is, in errors.
            log: File that vLLM's log goes to.
            version: Weight version of the checkpoint.
            transport: How new weights come: `shm` or `nccl`.
            training: Refuse to sample what cannot be trained on.
            turn_deadline_s: Seconds in which each turn must have been sampled.

        Raises:
            UserError: `model` is not a checkpoint directory.
            Overdue: It did not start within `start_deadline_s`.
        """
        model, log = Path(model), Path(log)
        for pattern in ("config.json", "*.safetensors"):
            if not any(model.glob(pattern)):
                raise UserError(f"{model} has no {pattern}; give the directory of a Hugging Face checkpoint")
        prepare_environment(config)
        ids = banned_ids(model)
        from vllm.v1.engine.async_llm import AsyncLLM

        args = engine_args(model, config, ids, log, BACKENDS[transport], cls.processors)
        gauge = EngineGauge()
        start = asyncio.to_thread(AsyncLLM.from_engine_args, args, stat_loggers=[gauge])
        llm = await within(
            start_deadline_s, start, who=name, what=f"starting an engine on {model} (log: {log})"
        )
        engine = cls(
            llm,
            name=name,
            banned=ids,
            pad_id=int(llm.model_config.hf_config.image_token_id),
            version=version,
            training=training,
            deadline_s=turn_deadline_s,
            gauge=gauge,
        )
        await engine._call("labelling its weights", llm.update_weight_version(str(version)))
        return engine

    async def act(
        self, prompt: Prompt, sampling: Sampling, *, request: str, heard: Heard | None = None
    ) -> Sampled:
        """Samples one turn; `heard` is told its text as it comes.

        Stops after `</video_zoom>` (kept) or the end token (kept). Log-probs are of
        the distribution sampled from: banned ids at minus infinity, then divided
        by the temperature (1 where it is 0).

        Raises:
            ValueError: The prompt is too long, or its pads and frames do not match, or
                top_p is not 1 in training: log-probs of a cut distribution are no use there.
            Overdue: It took longer than the engine's deadline; the request is aborted.
            EngineFailed: The engine is dead.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._training and sampling.top_p != 1:
            raise ValueError(f"top_p={sampling.top_p} in turn {request}: training needs top_p=1")
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            stop=[ZOOM_END],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.CUMULATIVE if heard else RequestOutputKind.FINAL_ONLY,
        )
        output = await self._generate(prompt, params, request, heard=heard)
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        return Sampled(
            token_ids=ids,
            logprobs=tuple(row[i].logprob for i, row in zip(ids, completion.logprobs or (), strict=True)),
            versions=tuple(
                VersionSpan(s.start, s.end, int(s.version)) for s in completion.weight_versions or ()
            ),
            sampling=sampling,
            stop=_stop(completion.finish_reason, completion.stop_reason),
        )

    async def logprobs(
        self, prompt: Prompt, token_ids: Sequence[int], *, temperature: float = 1.0, request: str = "score"
    ) -> tuple[float, ...]:
        """Log-probs `[T]` of given `token_ids` after `prompt`, as `act` would report them.

        One one-token request per position, so that they pass through the same
        sampler and the same caches as sampled turns do. Ignores a closed gate:
        new weights are checked with it before episodes go on.
        """
        from vllm import SamplingParams

        async def score(position: int) -> float:
            so_far = Prompt((*prompt.compact_ids, *token_ids[:position]), prompt.frames, ())
            wanted = token_ids[position]
            params = SamplingParams(temperature=temperature, max_tokens=1, logprob_token_ids=[wanted], seed=0)
            output = await self._generate(so_far, params, f"{request}:{position}", gated=False)
            return float(output.outputs[0].logprobs[0][wanted].logprob)

        return tuple(await asyncio.gather(*(score(position) for position in range(len(token_ids)))))

    async def draft(
        self, prompt: Prompt, forced: Sequence[int], about: Sequence[int], *, max_tokens: int, request: str
    ) -> Draft:
        """Continues `prompt` and `forced` greedily, up to `</answer>` (kept) or the end token (kept).

        Tells the log-probs of the tokens in `about` at every position, or of the likeliest ones
        where that is empty; of the same distribution as in `act`.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=None if about else _LIKELIEST,
            logprob_token_ids=list(about) or None,
            stop=[ANSWER_END],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        so_far = Prompt((*prompt.compact_ids, *forced), prompt.frames, ())
        completion = (await self._generate(so_far, params, request)).outputs[0]
        told = [{token: found.logprob for token, found in row.items()} for row in completion.logprobs or ()]
        rows = [{token: row[token] for token in about} if about else row for row in told]
        return Draft(tuple(completion.token_ids), tuple(rows))

    async def pause(self, *, clear_caches: bool = True) -> None:
        """Freezes turns where they are; new ones wait at the gate until `resume`.

        `clear_caches` drops what the old weights have computed: keys and values,
        image embeddings (and preprocessed frames, which vLLM drops with them).
        Frozen turns then go on with the new weights from recomputed keys and values.
        """
        self._open.clear()
        await self._call("pausing", self._llm.pause_generation(mode="keep", clear_cache=clear_caches))

    async def init_weights(self, info: dict[str, Any]) -> None:
        """Connects the engine's weight transfer to the other side; `info` is the backend's own."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=info)
        await self._call("connecting to the weights", self._llm.init_weight_transfer_engine(request))

    async def receive(self, update: Update) -> None:
        """Loads one whole set of weights, between `pause` and `resume`.

        Raises:
            EngineFailed: Something did not arrive as announced. The engine may hold
                a mixture of weights then and must not be resumed.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._call("starting a weight update", self._llm.start_weight_update())
        request = WeightTransferUpdateRequest(update_info=update.info)
        await self._call(f"weight version {update.version}", self._llm.update_weights(request))
        await self._call("finishing a weight update", self._llm.finish_weight_update(str(update.version)))
        self.version = update.version

    async def thaw(self) -> None:
        """Lets the engine compute again; new turns still wait, so that weights can be checked first."""
        await self._call("resuming", self._llm.resume_generation())

    async def score(self, probe: Probe) -> tuple[float, ...]:
        """Log-probs `[T]` of the probe's tokens, at temperature 1; works between `thaw` and `resume`."""
        frames = tuple(
            Frame(FrameRef("probe", "", 0, float(i), image.shape[1], image.shape[0], "", "", digest), image)
            for i, (image, digest) in enumerate(zip(probe.images, probe.digests(), strict=True))
        )
        prompt = Prompt(probe.compact_ids, frames, ())
        return await self.logprobs(prompt, probe.token_ids, request=f"probe of version {self.version}")

    async def resume(self) -> None:
        """Undoes `pause`."""
        await self.thaw()
        self._open.set()

    async def reset_caches(self) -> None:
        """Drops keys and values, image embeddings and preprocessed frames."""
        await self._call(
            "resetting its prefix cache", self._llm.reset_prefix_cache(reset_running_requests=True)
        )
        await self._call("resetting its frame cache", self._llm.reset_mm_cache())
        await self._call("resetting its encoder cache", self._llm.reset_encoder_cache())

    def stats(self) -> EngineStats:
        """Counts since the start, and the state of its key/value cache."""
        return self._gauge.onto(replace(self._stats, running=self._running))

    async def check(self) -> None:
        """Raises `EngineFailed` if the engine's process is gone."""
        await self._call("a health check", self._llm.check_health())

    async def shutdown(self) -> None:
        """Ends the engine's process; safe to call twice."""
        self._open.clear()
        llm, self._running_llm = self._running_llm, None
        if llm is not None:
            end = asyncio.to_thread(llm.shutdown, _SHUTDOWN_S / 2)
            await within(_SHUTDOWN_S, end, who=self.name, what="shutting down its engine")

    @property
    def _llm(self) -> AsyncLLM:
        if self._running_llm is None:
            raise EngineFailed(f"{self.name} was shut down")
        return self._running_llm

    async def _generate(
        self, prompt: Prompt, params: Any, request: str, *, gated: bool = True, heard: Heard | None = None
    ) -> Any:
        """Plays one request to its end; returns vLLM's `RequestOutput`."""
        if (pads := prompt.compact_ids.count(self._pad_id)) != len(prompt.frames):
            raise ValueError(f"turn {request} has {pads} image slots for {len(prompt.frames)} frames")
        text: dict[str, Any] = {"prompt_token_ids": list(prompt.compact_ids)}
        if prompt.frames:
            text["multi_modal_data"] = {"image": [frame.rgb for frame in prompt.frames]}
            text["multi_modal_uuids"] = {"image": [frame_key(frame) for frame in prompt.frames]}
        self._running += 1
        try:
            # A cancelled generator aborts its request in the engine.
            output = await self._call(f"turn {request}", self._play(text, params, request, gated, heard))
        finally:
            self._running -= 1
        self._stats = replace(
            self._stats,
            turns=self._stats.turns + 1,
            prompt_tokens=self._stats.prompt_tokens + len(output.prompt_token_ids),
            cached_tokens=self._stats.cached_tokens + (output.num_cached_tokens or 0),
            sampled_tokens=self._stats.sampled_tokens + len(output.outputs[0].token_ids),
        )
        return output

    async def _play(
        self, text: dict[str, Any], params: Any, request: str, gated: bool, heard: Heard | None
    ) -> Any:
        for attempt in range(_SENDS):
            if gated:
                await self._open.wait()
            output = None
            async for output in self._llm.generate(text, params, f"{request}~{attempt}"):
                if heard is not None:
                    heard(output.outputs[0].text)
            # A pause between preprocessing and arrival drops frames that the engine was
            # believed to have; nothing was sampled, and the next send brings them along.
            if output is not None and output.outputs[0].finish_reason != "error":
                return output
        raise EngineFailed(f"{self.name} refused turn {request} {_SENDS} times (its log says why)")

    async def _call(self, what: str, call: Awaitable[T]) -> T:
        """Awaits the engine, with the deadline and with errors that say who and what."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await within(self._deadline_s, self._while_alive(call, what), who=self.name, what=what)
        except VLLMClientError as error:
            raise ValueError(f"{self.name} cannot do {what}: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"{self.name} failed at {what}: {error.__cause__ or error}") from error

    async def _while_alive(self, call: Awaitable[T], what: str) -> T:
        """Awaits the engine, as long as its process lives.

        vLLM fails turns when that dies, but leaves all other calls without an answer.
        """
        waiting = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({waiting}, timeout=_LOOK_S))[0]:
                if self._running_llm is not None and self._running_llm.errored:
                    raise EngineFailed(f"{self.name} failed at {what}: its process has died")
            return waiting.result()
        finally:
            waiting.cancel()


def _stop(finish: str | None, reason: int | str | None) -> str:
    """The trajectory's word for why vLLM stopped."""
    if finish == "length":
        return "length"
    if finish == "stop":
        return "zoom" if reason == ZOOM_END else "end"
    raise EngineFailed(f"a turn ended with finish reason {finish!r}")
