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
from vz_ray.env.chat_format import vision_placeholder_ids
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SampledAction, SamplingParams, VersionSpan
from vz_ray.env.zoom_gate import DraftAnswer
from vz_ray.rollout.engine_args import build_engine_args, prepare_environment
from vz_ray.rollout.engine_stats import EngineStatLogger, EngineStats
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.weight_sync import VLLM_BACKENDS, ParityProbe, WeightUpdate

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ZOOM_CALL_END = "</video_zoom>"
"""A turn stops where a zoom call is complete."""
ANSWER_END = "</answer>"
"""A draft stops where its answer is complete."""
_DRAFT_TOP_LOGPROBS = 20
"""Tokens whose log-probs are told at each position of a draft; vLLM tells no more by default."""

_MAX_SEND_ATTEMPTS = 3
_LIVENESS_INTERVAL_S = 1.0
"""Between two looks whether an engine that has not answered lives."""
_SHUTDOWN_TIMEOUT_S = 30.0

T = TypeVar("T")
TextCallback: TypeAlias = Callable[[str], None]
"""Is given all text of a turn so far, each time that there is more."""


class EngineFailedError(RuntimeError):
    """The engine cannot go on: it must be replaced, and what it was doing done elsewhere."""


def banned_token_ids(model: str | Path) -> tuple[int, ...]:
    """Ids that are never sampled from the checkpoint `model`; the learner masks the same ones."""
    from transformers import AutoTokenizer

    return vision_placeholder_ids(
        AutoTokenizer.from_pretrained(str(model), trust_remote_code=False).get_vocab()
    )


def frame_cache_key(frame: Frame) -> str:
    """Identity of a frame in the engine's caches.

    The digest covers bytes only: a black frame of 28 x 56 and one of 56 x 28
    have the same, but not the same patches.
    """
    return f"{frame.ref.digest}-{frame.ref.width}x{frame.ref.height}"


class VllmEngine:
    """A vLLM engine that plays one policy; a `PolicyModel` in the sense of the episode runner.

    Example:
        engine = await Engine.start("model", EngineConfig(), name="rollout-0", log="rollout-0.log")
        turn = await engine.act(prompt, Sampling(temperature=1.0), request="0/q7/3#0:1")
        await engine.shutdown()
    """

    extra_logits_processors: ClassVar[Sequence[type]] = ()
    """Further logits processors of vLLM, after the ban."""

    def __init__(
        self,
        llm: AsyncLLM,
        *,
        name: str,
        banned_token_ids: tuple[int, ...],
        pad_id: int,
        version: int,
        training: bool,
        turn_timeout_s: float,
        stat_logger: EngineStatLogger,
    ) -> None:
        self.name, self.pulls_weights = name, False
        self._training = training
        self._pad_id = pad_id
        self.banned_token_ids = banned_token_ids
        self.version = version
        self._llm_or_none: AsyncLLM | None = llm
        self._turn_timeout_s = turn_timeout_s
        self._accepting_turns = asyncio.Event()
        self._accepting_turns.set()
        self._counters, self._stat_logger = EngineStats(), stat_logger
        self._running_turns = 0

    @classmethod
    async def start(
        cls,
        model: str | Path,
        config: EngineConfig,
        *,
        name: str,
        log_file: str | Path,
        version: int = 0,
        transport: str = "shm",
        training: bool = True,
        start_timeout_s: float = 600.0,
        turn_timeout_s: float = 300.0,
    ) -> VllmEngine:
        """Starts an engine on the checkpoint directory `model`.

        Args:
            name: Who it is, in errors.
            log_file: File that vLLM's log goes to.
            version: Weight version of the checkpoint.
            transport: How new weights come: `shm` or `nccl`.
            training: Refuse to sample what cannot be trained on.
            turn_timeout_s: Seconds in which each turn must have been sampled.

        Raises:
            UserError: `model` is not a checkpoint directory.
            Overdue: It did not start within `start_timeout_s`.
        """
        model, log_file = Path(model), Path(log_file)
        for pattern in ("config.json", "*.safetensors"):
            if not any(model.glob(pattern)):
                raise UserError(f"{model} has no {pattern}; give the directory of a Hugging Face checkpoint")
        prepare_environment(config)
        ids = banned_token_ids(model)
        from vllm.v1.engine.async_llm import AsyncLLM

        args = build_engine_args(
            model, config, ids, log_file, VLLM_BACKENDS[transport], cls.extra_logits_processors
        )
        gauge = EngineStatLogger()
        start = asyncio.to_thread(AsyncLLM.from_engine_args, args, stat_loggers=[gauge])
        llm = await with_timeout(
            start, start_timeout_s, target=name, operation=f"starting an engine on {model} (log: {log_file})"
        )
        engine = cls(
            llm,
            name=name,
            banned_token_ids=ids,
            pad_id=int(llm.model_config.hf_config.image_token_id),
            version=version,
            training=training,
            turn_timeout_s=turn_timeout_s,
            stat_logger=gauge,
        )
        await engine._call_engine("labelling its weights", llm.update_weight_version(str(version)))
        return engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str,
        on_text: TextCallback | None = None,
    ) -> SampledAction:
        """Samples one turn; `on_text` is told its text as it comes.

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

        if self._training and sampling_params.top_p != 1:
            raise ValueError(f"top_p={sampling_params.top_p} in turn {request_id}: training needs top_p=1")
        params = SamplingParams(
            temperature=sampling_params.temperature,
            top_p=sampling_params.top_p,
            max_tokens=sampling_params.max_tokens,
            seed=sampling_params.seed,
            logprobs=0,
            stop=[ZOOM_CALL_END],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.CUMULATIVE if on_text else RequestOutputKind.FINAL_ONLY,
        )
        output = await self._generate(prompt, params, request_id, heard=on_text)
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        return SampledAction(
            token_ids=ids,
            logprobs=tuple(row[i].logprob for i, row in zip(ids, completion.logprobs or (), strict=True)),
            versions=tuple(
                VersionSpan(s.start, s.end, int(s.version)) for s in completion.weight_versions or ()
            ),
            sampling_params=sampling_params,
            stop_reason=_stop_reason(completion.finish_reason, completion.stop_reason),
        )

    async def compute_logprobs(
        self,
        prompt: Prompt,
        token_ids: Sequence[int],
        *,
        temperature: float = 1.0,
        request_id: str = "score_probe",
    ) -> tuple[float, ...]:
        """Log-probs `[T]` of given `token_ids` after `prompt`, as `generate` would report them.

        One one-token request per position, so that they pass through the same
        sampler and the same caches as sampled turns do. Ignores a closed gate:
        new weights are checked with it before episodes go on.
        """
        from vllm import SamplingParams

        async def score(position: int) -> float:
            so_far = Prompt((*prompt.compact_ids, *token_ids[:position]), prompt.frames, ())
            wanted = token_ids[position]
            params = SamplingParams(temperature=temperature, max_tokens=1, logprob_token_ids=[wanted], seed=0)
            output = await self._generate(so_far, params, f"{request_id}:{position}", gated=False)
            return float(output.outputs[0].logprobs[0][wanted].logprob)

        return tuple(await asyncio.gather(*(score(position) for position in range(len(token_ids)))))

    async def draft_answer(
        self,
        prompt: Prompt,
        forced_token_ids: Sequence[int],
        logprob_token_ids: Sequence[int],
        *,
        max_tokens: int,
        request_id: str,
    ) -> DraftAnswer:
        """Continues `prompt` and `forced_token_ids` greedily, up to `</answer>` (kept) or the end token (kept).

        Tells the log-probs of the tokens in `logprob_token_ids` at every position, or of the likeliest ones
        where that is empty; of the same distribution as in `generate`.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=None if logprob_token_ids else _DRAFT_TOP_LOGPROBS,
            logprob_token_ids=list(logprob_token_ids) or None,
            stop=[ANSWER_END],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        so_far = Prompt((*prompt.compact_ids, *forced_token_ids), prompt.frames, ())
        completion = (await self._generate(so_far, params, request_id)).outputs[0]
        told = [{token: found.logprob for token, found in row.items()} for row in completion.logprobs or ()]
        rows = [
            {token: row[token] for token in logprob_token_ids} if logprob_token_ids else row for row in told
        ]
        return DraftAnswer(tuple(completion.token_ids), tuple(rows))

    async def pause(self, *, clear_caches: bool = True) -> None:
        """Freezes turns where they are; new ones wait at the gate until `resume`.

        `clear_caches` drops what the old weights have computed: keys and values,
        image embeddings (and preprocessed frames, which vLLM drops with them).
        Frozen turns then go on with the new weights from recomputed keys and values.
        """
        self._accepting_turns.clear()
        await self._call_engine("pausing", self._llm.pause_generation(mode="keep", clear_cache=clear_caches))

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Connects the engine's weight transfer to the other side; `info` is the backend's own."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=info)
        await self._call_engine("connecting to the weights", self._llm.init_weight_transfer_engine(request))

    async def receive_weights(self, update: WeightUpdate) -> None:
        """Loads one whole set of weights, between `pause` and `resume`.

        Raises:
            EngineFailed: Something did not arrive as announced. The engine may hold
                a mixture of weights then and must not be resumed.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._call_engine("starting a weight update", self._llm.start_weight_update())
        request = WeightTransferUpdateRequest(update_info=update.transfer_info)
        await self._call_engine(f"weight version {update.version}", self._llm.update_weights(request))
        await self._call_engine(
            "finishing a weight update", self._llm.finish_weight_update(str(update.version))
        )
        self.version = update.version

    async def resume_engine(self) -> None:
        """Lets the engine compute again; new turns still wait, so that weights can be checked first."""
        await self._call_engine("resuming", self._llm.resume_generation())

    async def score_probe(self, probe: ParityProbe) -> tuple[float, ...]:
        """Log-probs `[T]` of the probe's tokens, at temperature 1; works between `resume_engine` and `resume`."""
        frames = tuple(
            Frame(FrameRef("probe", "", 0, float(i), image.shape[1], image.shape[0], "", "", digest), image)
            for i, (image, digest) in enumerate(zip(probe.images, probe.digests(), strict=True))
        )
        prompt = Prompt(probe.compact_ids, frames, ())
        return await self.compute_logprobs(
            prompt, probe.token_ids, request_id=f"probe of version {self.version}"
        )

    async def resume(self) -> None:
        """Undoes `pause`."""
        await self.resume_engine()
        self._accepting_turns.set()

    async def reset_caches(self) -> None:
        """Drops keys and values, image embeddings and preprocessed frames."""
        await self._call_engine(
            "resetting its prefix cache", self._llm.reset_prefix_cache(reset_running_requests=True)
        )
        await self._call_engine("resetting its frame cache", self._llm.reset_mm_cache())
        await self._call_engine("resetting its encoder cache", self._llm.reset_encoder_cache())

    def stats(self) -> EngineStats:
        """Counts since the start, and the state of its key/value cache."""
        return self._stat_logger.merge_into(replace(self._counters, running_turns=self._running_turns))

    async def check_health(self) -> None:
        """Raises `EngineFailedError` if the engine's process is gone."""
        await self._call_engine("a health check", self._llm.check_health())

    async def shutdown(self) -> None:
        """Ends the engine's process; safe to call twice."""
        self._accepting_turns.clear()
        llm, self._llm_or_none = self._llm_or_none, None
        if llm is not None:
            end = asyncio.to_thread(llm.shutdown, _SHUTDOWN_TIMEOUT_S / 2)
            await with_timeout(
                end, _SHUTDOWN_TIMEOUT_S, target=self.name, operation="shutting down its engine"
            )

    @property
    def _llm(self) -> AsyncLLM:
        if self._llm_or_none is None:
            raise EngineFailedError(f"{self.name} was shut down")
        return self._llm_or_none

    async def _generate(
        self,
        prompt: Prompt,
        params: Any,
        request: str,
        *,
        gated: bool = True,
        heard: TextCallback | None = None,
    ) -> Any:
        """Plays one request to its end; returns vLLM's `RequestOutput`."""
        if (pads := prompt.compact_ids.count(self._pad_id)) != len(prompt.frames):
            raise ValueError(f"turn {request} has {pads} image slots for {len(prompt.frames)} frames")
        text: dict[str, Any] = {"prompt_token_ids": list(prompt.compact_ids)}
        if prompt.frames:
            text["multi_modal_data"] = {"image": [frame.rgb for frame in prompt.frames]}
            text["multi_modal_uuids"] = {"image": [frame_cache_key(frame) for frame in prompt.frames]}
        self._running_turns += 1
        try:
            # A cancelled generator aborts its request in the engine.
            output = await self._call_engine(
                f"turn {request}", self._run_request(text, params, request, gated, heard)
            )
        finally:
            self._running_turns -= 1
        self._counters = replace(
            self._counters,
            turns=self._counters.turns + 1,
            prompt_tokens=self._counters.prompt_tokens + len(output.prompt_token_ids),
            cached_tokens=self._counters.cached_tokens + (output.num_cached_tokens or 0),
            sampled_tokens=self._counters.sampled_tokens + len(output.outputs[0].token_ids),
        )
        return output

    async def _run_request(
        self, text: dict[str, Any], params: Any, request: str, gated: bool, heard: TextCallback | None
    ) -> Any:
        for attempt in range(_MAX_SEND_ATTEMPTS):
            if gated:
                await self._accepting_turns.wait()
            output = None
            async for output in self._llm.generate(text, params, f"{request}~{attempt}"):
                if heard is not None:
                    heard(output.outputs[0].text)
            # A pause between preprocessing and arrival drops frames that the engine was
            # believed to have; nothing was sampled, and the next send brings them along.
            if output is not None and output.outputs[0].finish_reason != "error":
                return output
        raise EngineFailedError(
            f"{self.name} refused turn {request} {_MAX_SEND_ATTEMPTS} times (its log says why)"
        )

    async def _call_engine(self, what: str, call: Awaitable[T]) -> T:
        """Awaits the engine, with the deadline and with errors that say who and what."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await with_timeout(
                self._while_alive(call, what), self._turn_timeout_s, target=self.name, operation=what
            )
        except VLLMClientError as error:
            raise ValueError(f"{self.name} cannot do {what}: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailedError(f"{self.name} failed at {what}: {error.__cause__ or error}") from error

    async def _while_alive(self, call: Awaitable[T], what: str) -> T:
        """Awaits the engine, as long as its process lives.

        vLLM fails turns when that dies, but leaves all other calls without an answer.
        """
        waiting = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({waiting}, timeout=_LIVENESS_INTERVAL_S))[0]:
                if self._llm_or_none is not None and self._llm_or_none.errored:
                    raise EngineFailedError(f"{self.name} failed at {what}: its process has died")
            return waiting.result()
        finally:
            waiting.cancel()


def _stop_reason(finish: str | None, reason: int | str | None) -> str:
    """The trajectory's word for why vLLM stopped."""
    if finish == "length":
        return "length"
    if finish == "stop":
        return "zoom" if reason == ZOOM_CALL_END else "end"
    raise EngineFailedError(f"a turn ended with finish reason {finish!r}")
