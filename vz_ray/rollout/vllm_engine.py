"""One vLLM engine: sample turns token in, token out, and load new weights.

`vllm_process.py` has the child process, `vllm_requests.py` the conversion of requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from vz_ray.config.rollout import EngineConfig
from vz_ray.env.chat_format import vision_placeholder_ids
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SampledAction, SamplingParams
from vz_ray.env.zoom_gate import DraftAnswer
from vz_ray.rollout.engine_args import build_engine_args, prepare_environment
from vz_ray.rollout.engine_stats import EngineStats
from vz_ray.rollout.turn_sampling import sample_turn
from vz_ray.rollout.vllm_process import EngineFailedError, VllmProcess
from vz_ray.rollout.vllm_requests import draft_params, request_inputs, turn_params
from vz_ray.utils.errors import UserError
from vz_ray.weight_sync import VLLM_BACKENDS, ParityProbe, ProbeScore, WeightUpdate

_MAX_SEND_ATTEMPTS = 3
_MISSING_FRAME = "Expected a cached item"
"""Start of vLLM's error when a frame leaves its frontend cache between the lookup and the use."""

TextCallback: TypeAlias = Callable[[str], None]
"""Callback with the complete text of the turn so far, after each new token."""


def banned_token_ids(model: str | Path) -> tuple[int, ...]:
    """Return the token ids that are never sampled. The learner masks the same ids."""
    from transformers import AutoTokenizer

    return vision_placeholder_ids(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False).get_vocab())


class VllmEngine:
    """A vLLM engine with one model. Implements `Policy` and `EngineClient`.

    Example:
        engine = await VllmEngine.start("model", EngineConfig(), name="rollout-0", log_file="engine.log")
        action = await engine.generate(prompt, SamplingParams(), request_id="0/q7/3#0/turn1")
        await engine.shutdown()
    """

    extra_logits_processors: ClassVar[Sequence[type]] = ()
    """Logits processors that run after `TokenMask`."""

    def __init__(
        self,
        process: VllmProcess,
        *,
        banned_token_ids: tuple[int, ...],
        pad_id: int,
        version: int,
        training: bool,
        adapter: Any = None,
    ) -> None:
        self.name, self.pulls_weights, self.learner_rank = process.name, False, 0
        self._asleep = False
        self._training, self._adapter = training, adapter
        self._pad_id = pad_id
        self.banned_token_ids = banned_token_ids
        self.version = version
        self._process = process
        self._accepting_turns = asyncio.Event()
        self._accepting_turns.set()
        self._counters = EngineStats()
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
        can_sleep: bool = False,
        training: bool = True,
        start_timeout_s: float = 600.0,
        turn_timeout_s: float = 300.0,
    ) -> VllmEngine:
        """Start an engine.

        Args:
            model: Checkpoint directory.
            config: Engine settings.
            name: Name of the engine, for errors.
            log_file: vLLM's log file.
            version: Weight version of the checkpoint.
            transport: Weight transport: `shm`, `nccl` or `ipc`.
            can_sleep: Allow `sleep` to free GPU memory.
            training: Reject sampling parameters that cannot be trained on.
            start_timeout_s: Timeout of the start.
            turn_timeout_s: Timeout of each turn and each other call.

        Raises:
            UserError: `model` is not a checkpoint directory.
            StepTimeout: The engine did not start within `start_timeout_s`.
        """
        model, log_file = Path(model), Path(log_file)
        for pattern in ("config.json", "*.safetensors"):
            if not any(model.glob(pattern)):
                raise UserError(f"{model} has no {pattern}; pass a Hugging Face checkpoint directory")
        prepare_environment(config)
        from vz_ray.weight_sync.vllm_adapter import adapter_request

        ids = banned_token_ids(model)
        backend, processors = VLLM_BACKENDS[transport], cls.extra_logits_processors
        args = build_engine_args(model, config, ids, log_file, backend, processors, can_sleep=can_sleep)
        process = await VllmProcess.start(
            args, name=name, log_file=log_file, start_timeout_s=start_timeout_s, call_timeout_s=turn_timeout_s
        )
        pad_id = int(process.llm.model_config.hf_config.image_token_id)
        adapter = adapter_request() if config.adapter_rank else None
        engine = cls(process, banned_token_ids=ids, pad_id=pad_id, version=version, training=training, adapter=adapter)
        await engine._activate_adapter()
        await process.call("setting the initial weight version", process.llm.update_weight_version(str(version)))
        return engine

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str,
        on_text: TextCallback | None = None,
    ) -> SampledAction:
        """Sample one turn. Stop after `</video_zoom>` or the end token; both are kept.

        A zoom call inside reasoning that the prompt opened does not end the turn; see `turn_sampling`.

        Log-probs are of the distribution that was sampled from: banned ids at minus infinity, then
        divided by the temperature (by 1 for greedy sampling).

        Args:
            prompt: Conversation so far.
            sampling_params: Sampling parameters.
            request_id: Unique id, for errors and vLLM's log.
            on_text: Callback for streaming.

        Raises:
            ValueError: The prompt is too long, image pads and frames do not match, or top_p is not 1 in
                training (log-probs of a truncated distribution cannot be trained on).
            StepTimeout: The turn exceeded its timeout. The request is aborted.
            EngineFailedError: The engine process has died.
        """
        if self._training and sampling_params.top_p != 1:
            raise ValueError(f"top_p={sampling_params.top_p} in turn {request_id}: training needs top_p=1")

        async def run_request(prompt: Prompt, params: SamplingParams, text_before: str) -> Any:
            callback = None if on_text is None else lambda text: on_text(text_before + text)
            vllm_params = turn_params(params, streaming=on_text is not None)
            return await self._generate(prompt, vllm_params, request_id, on_text=callback)

        return await sample_turn(prompt, sampling_params, run_request)

    async def compute_logprobs(
        self,
        prompt: Prompt,
        token_ids: Sequence[int],
        *,
        temperature: float = 1.0,
        request_id: str = "score_probe",
    ) -> ProbeScore:
        """Return the log-probs `[T]` of `token_ids` after `prompt`, as `generate` would report them.

        Each position is a one-token request, so that the log-probs use the same sampler and caches as
        sampled turns. Runs even while turns wait for `resume`, to check new weights.
        """
        import vllm

        async def score(position: int) -> tuple[int, float]:
            prefix = Prompt((*prompt.compact_ids, *token_ids[:position]), prompt.frames, ())
            token = token_ids[position]
            params = vllm.SamplingParams(temperature=temperature, max_tokens=1, logprob_token_ids=[token], seed=0)
            output = await self._generate(prefix, params, f"{request_id}:{position}", wait=False)
            return len(output.prompt_token_ids), float(output.outputs[0].logprobs[0][token].logprob)

        scores = await asyncio.gather(*(score(position) for position in range(len(token_ids))))
        return ProbeScore(scores[0][0], tuple(logprob for _, logprob in scores))

    async def draft_answer(
        self,
        prompt: Prompt,
        forced_token_ids: Sequence[int],
        logprob_token_ids: Sequence[int],
        *,
        max_tokens: int,
        request_id: str,
    ) -> DraftAnswer:
        """See `DraftingPolicy.draft_answer`. The log-probs are of the same distribution as in `generate`."""
        params = draft_params(max_tokens, logprob_token_ids)
        prefix = Prompt((*prompt.compact_ids, *forced_token_ids), prompt.frames, ())
        completion = (await self._generate(prefix, params, request_id)).outputs[0]
        logprobs = tuple(
            {token: entries[token].logprob for token in logprob_token_ids or entries}
            for entries in completion.logprobs or ()
        )
        return DraftAnswer(tuple(completion.token_ids), logprobs)

    async def sleep(self, level: int) -> None:
        """End running turns and free the GPU memory; new turns wait until `resume`.

        vLLM drops keys and values, image embeddings and preprocessed frames. `pause` wakes the weights and
        `resume_engine` the KV cache. On CPU, vLLM keeps its memory.

        Args:
            level: 1 keeps a copy of the weights in host memory, 2 discards them.
        """
        self._accepting_turns.clear()
        await self._process.call("falling asleep", self._process.llm.sleep(level, mode="abort"))
        self._asleep = True

    async def pause(self, *, clear_caches: bool = True) -> None:
        """Pause running turns. New turns wait until `resume`.

        A sleeping engine allocates the memory of its weights instead; after sleep level 2 they are undefined.

        With `clear_caches`, drop everything computed with the old weights: keys and values and image
        embeddings. vLLM drops preprocessed frames, too. Paused turns then continue with the new weights
        and recomputed keys and values.
        """
        self._accepting_turns.clear()
        if self._asleep:
            await self._process.call("waking its weights", self._process.llm.wake_up(tags=["weights"]))
            return
        await self._process.call("pausing", self._process.llm.pause_generation(mode="keep", clear_cache=clear_caches))

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Connect to the learner's transport. `info` is the `init_info` of the vLLM transfer backend."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=info)
        await self._process.call(
            "initializing the weight transfer", self._process.llm.init_weight_transfer_engine(request)
        )

    async def receive_weights(self, update: WeightUpdate) -> None:
        """Load one complete set of weights, between `pause` and `resume`.

        Raises:
            EngineFailedError: The weights were incomplete or corrupt. The engine may hold a mixture of
                weights and must not be resumed.
        """
        await self.begin_update()
        await self.receive_part(update.transfer_info)
        await self.finish_update(update.version)

    async def begin_update(self) -> None:
        """Begin to load one complete set of weights, between `pause` and `resume`; see `receive_weights`."""
        await self._process.call("starting a weight update", self._process.llm.start_weight_update())

    async def receive_part(self, info: dict[str, Any]) -> None:
        """Load a part of the weights. `info` is the `update_info` of the vLLM transfer backend."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._process.call("loading weights", self._process.llm.update_weights(WeightTransferUpdateRequest(info)))

    async def finish_update(self, version: int) -> None:
        """Activate the weights after the last part."""
        await self._process.call("finishing a weight update", self._process.llm.finish_weight_update(str(version)))
        await self._activate_adapter()
        self.version = version

    async def _activate_adapter(self) -> None:
        if self._adapter is not None:
            await self._process.call("activating its adapter", self._process.llm.collective_rpc("activate_adapter"))

    async def resume_engine(self) -> None:
        """Resume computation. New turns still wait, so that the weights can be checked first.

        A sleeping engine allocates its KV cache first.
        """
        if self._asleep:
            await self._process.call("waking its KV cache", self._process.llm.wake_up(tags=["kv_cache"]))
            self._asleep = False
        await self._process.call("resuming", self._process.llm.resume_generation())

    async def continue_probe(self, probe: ParityProbe) -> tuple[int, ...]:
        """Return a greedy continuation of the probe's prompt, as long as the probe's own."""
        import vllm

        params = vllm.SamplingParams(temperature=0.0, max_tokens=len(probe.token_ids), ignore_eos=True)
        output = await self._generate(Prompt(probe.compact_ids, probe.frames, ()), params, "continuation of the probe")
        return tuple(output.outputs[0].token_ids)

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
        """Score the probe's tokens. Works between `resume_engine` and `resume`."""
        prompt = Prompt(probe.compact_ids, probe.frames, ())
        return await self.compute_logprobs(prompt, probe.token_ids, request_id=f"probe of version {self.version}")

    async def resume(self) -> None:
        """Undo `pause`."""
        await self.resume_engine()
        self._accepting_turns.set()

    async def reset_caches(self) -> None:
        """Clear keys and values, image embeddings and preprocessed frames."""
        await self._process.call(
            "resetting its prefix cache", self._process.llm.reset_prefix_cache(reset_running_requests=True)
        )
        await self._process.call("resetting its frame cache", self._process.llm.reset_mm_cache())
        await self._process.call("resetting its encoder cache", self._process.llm.reset_encoder_cache())

    def stats(self) -> EngineStats:
        """Return the counters since the start and the state of the key/value cache."""
        return self._process.stat_logger.merge_into(replace(self._counters, running_turns=self._running_turns))

    async def check_health(self) -> None:
        """Raise `EngineFailedError` if the engine process has died."""
        await self._process.call("a health check", self._process.llm.check_health())

    async def shutdown(self) -> None:
        """Terminate the engine process. Idempotent."""
        self._accepting_turns.clear()
        await self._process.shutdown()

    async def _generate(
        self,
        prompt: Prompt,
        params: Any,
        request_id: str,
        *,
        wait: bool = True,
        on_text: TextCallback | None = None,
    ) -> Any:
        """Run one request and return vLLM's `RequestOutput`. With `wait`, wait while turns are paused."""
        if (pads := prompt.compact_ids.count(self._pad_id)) != len(prompt.frames):
            raise ValueError(f"turn {request_id} has {pads} image slots for {len(prompt.frames)} frames")
        self._running_turns += 1
        try:
            # A cancelled generator aborts its request in the engine.
            output = await self._process.call(
                f"turn {request_id}", self._run_request(prompt, params, request_id, wait, on_text)
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
        self, prompt: Prompt, params: Any, request_id: str, wait: bool, on_text: TextCallback | None
    ) -> Any:
        """Run one request; send it again if one of its frames left vLLM's frame cache on the way."""
        from vllm.v1.engine.exceptions import EngineGenerateError

        inputs = request_inputs(prompt)
        for attempt in range(_MAX_SEND_ATTEMPTS):
            if wait:
                await self._accepting_turns.wait()
            output = None
            try:
                async for output in self._process.llm.generate(
                    inputs, params, f"{request_id}~{attempt}", lora_request=self._adapter
                ):
                    if on_text is not None:
                        on_text(output.outputs[0].text)
            except EngineGenerateError as error:
                # A frame was dropped from the frontend's cache while the request was being preprocessed.
                if _MISSING_FRAME not in str(error.__cause__):
                    raise
                continue
            # A pause between preprocessing and arrival drops cached frames that the request refers to.
            # Nothing was sampled, and the retry sends the frames again.
            if output is not None and output.outputs[0].finish_reason != "error":
                return output
        raise EngineFailedError(
            f"{self.name} rejected turn {request_id} {_MAX_SEND_ATTEMPTS} times; see the engine's log"
        )
