"""SFT and GRPO steps of one model, run on every rank in lockstep: plain torch.distributed and DeepSpeed.

Every rank receives all trajectories, which carry no pixels. Each rank computes the same micro-batch plan and
fetches the pixels of its share, ahead of the computation in a thread (`micro_batches`). One GRPO step:

    groups --> drop uninformative groups --> advantages --> mini-batches
    before any update, per mini-batch:    old log-probs, reference log-probs
    per epoch and mini-batch:             micro-batches: loss, backward; one optimizer step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner import checkpoint
from vz_ray.learner.advantages import is_trainable
from vz_ray.learner.batch import MicroBatch, collate
from vz_ray.learner.distributed import all_gather_object, all_reduce_max, all_reduce_sum, init_distributed
from vz_ray.learner.entropy import EntropyController
from vz_ray.learner.example import Example, encode_probe, encode_trajectory
from vz_ray.learner.export import export_hf
from vz_ray.learner.frame_cache import FeatureCache
from vz_ray.learner.grpo_loss import grpo_loss
from vz_ray.learner.grpo_metrics import GrpoMetrics, Metrics
from vz_ray.learner.image_inputs import in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.lora import adapters_disabled, add_adapters
from vz_ray.learner.micro_batches import InputTimes, MicroBatchLoader, Pixels
from vz_ray.learner.mini_batch import MiniBatch, build_mini_batches
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.policy_model import PolicyModel, flop_costs
from vz_ray.learner.replay import MODEL, SkippedUpdateMeta, save_skipped_batch, too_many_skips_error
from vz_ray.learner.state_offload import StateOffloader
from vz_ray.learner.step_snapshot import StepSnapshot
from vz_ray.learner.train_engine import TrainEngine, prepare_frozen, training_dtype
from vz_ray.learner.weight_sources import AdapterSource, ZeroWeightSource
from vz_ray.planning.sequence_parallel import check_sequence_parallel
from vz_ray.utils.interrupt import StepStopped
from vz_ray.weight_sync import ParityProbe, ProbeScore, WeightSource

LogprobFn = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Returns log-probs and entropies of the sampled tokens, `[B, S]` each."""


class Trainer:
    """The model under training. Every method must be called on all ranks with the same arguments.

    Raises:
        UserError: `config.model` is not an HF checkpoint directory.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        torch.set_num_threads(config.num_threads)
        self.rank_info = init_distributed(config.timeout_s, config.sequence_parallel_size)
        dtype = training_dtype(config, self.rank_info)
        self.policy = self._load_policy(config.model, dtype)
        self.image_spec = ImageSpec.from_pretrained(config.model)
        self.micro_batches = MicroBatchLoader(
            config, self.rank_info, self.policy.tokens, self.image_spec, flop_costs(self.policy.shape)
        )
        self.policy.train()
        if config.gradient_checkpointing:
            self.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
        vision_tower = self.policy.hf.model.visual
        if config.freeze_vision:
            vision_tower.requires_grad_(False)
        if config.lora.rank:
            add_adapters(self.policy.hf, config.lora, config.model, config.seed)
        frozen_tower = not any(parameter.requires_grad for parameter in vision_tower.parameters())
        self._feature_cache = self._create_feature_cache(self.policy) if frozen_tower else None
        self.engine = TrainEngine(self.policy, config, self.rank_info)
        self._snapshot = StepSnapshot(self.engine, self.rank_info)
        self._entropy = EntropyController(config.loss.entropy_coef)
        self.reference_logprobs, self._reference_cache = self._create_reference(dtype)
        deepspeed = self.engine.deepspeed
        states = (deepspeed.optimizer, deepspeed.basic_optimizer, self.reference_logprobs)
        self._offloader = StateOffloader(deepspeed.module, states, self.rank_info.device)

    def _load_policy(self, directory: str, dtype: torch.dtype) -> PolicyModel:
        config = self.config
        policy = PolicyModel.from_pretrained(
            directory,
            dtype,
            chunk=config.logprob_chunk_tokens,
            vision_slice_patches=config.vision_slice_patches,
            mlp_tile_tokens=config.mlp_tile_tokens,
            lockstep_ranks=self.rank_info if config.zero_stage == 3 else None,
        )
        check_sequence_parallel(policy.shape, config.sequence_parallel_size)
        return policy

    def _create_reference(self, dtype: torch.dtype) -> tuple[LogprobFn | None, FeatureCache | None]:
        """Return the reference model of the KL term, if it is used, and the feature cache of its tower."""
        config = self.config
        if not config.loss.kl_coef:
            return None, None
        if not config.needs_separate_reference:
            return self._base_logprobs, self._feature_cache
        reference = self._load_policy(config.reference_model or config.model, dtype)
        same_tower = config.reference_model in (None, config.model) and self._feature_cache is not None
        cache = self._feature_cache if same_tower else self._create_feature_cache(reference)
        return prepare_frozen(reference, config, self.rank_info), cache

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        """Convert trajectories to arrays and check them."""
        return [
            encode_trajectory(trajectory, self.policy.tokens, self.policy.shape.vision.merge_size)
            for trajectory in trajectories
        ]

    def sft_step(self, trajectories: Sequence[Trajectory], pixels: Pixels) -> Metrics:
        """Do one optimizer step on the mean cross-entropy of all sampled tokens in the batch."""
        started, self.micro_batches.times = time.perf_counter(), InputTimes()
        examples = self.encode(trajectories)
        num_tokens = sum(len(example.sampled_positions) for example in examples)
        nats = 0.0
        plan = self.micro_batches.plan(examples)
        with self.micro_batches.load(examples, plan, pixels, self._feature_cache) as batches:
            for batch in batches:
                logprobs, _ = self.engine(batch, exclude_placeholders=False)
                self.engine.backward(-logprobs.sum() / num_tokens)
                nats -= float(logprobs.detach().sum())
        step_metrics = self.engine.step()
        self._handle_skipped(step_metrics, trajectories, "sft", None)
        nats = all_reduce_sum({"nats": nats}, self.rank_info)["nats"]
        return {"loss": nats / num_tokens, **step_metrics, **self._throughput(examples, started)}

    def grpo_step(
        self,
        groups: Sequence[Group],
        pixels: Pixels,
        weight_version: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Metrics:
        """Do one GRPO step: `epochs` passes over the groups, one optimizer step per mini-batch.

        Groups without a signal (see `is_trainable`) are dropped and counted. If no group remains, nothing is
        updated.

        Args:
            weight_version: Version of the current weights. Tokens sampled from other versions are compared
                with the engine in separate metrics (`_stale`), because a difference is expected for them.
                None treats all tokens as current.
            should_stop: Checked before each micro-batch; one rank suffices to stop all.

        Raises:
            StepStopped: `should_stop` was true. The state is that before the step; only `save_checkpoint` may follow.
        """
        started, self.micro_batches.times = time.perf_counter(), InputTimes()
        kept = [group for group in groups if is_trainable(group, self.config.loss)]
        metrics: Metrics = {"groups": len(kept), "groups_dropped": len(groups) - len(kept), "updates": 0}
        if not kept:
            return metrics
        size, plan = self.config.mini_batch_size, self.micro_batches.plan
        mini_batches = build_mini_batches(kept, self.encode, plan, size, self.config.loss)
        # With dropout, the forward pass of an update does not give the log-probs of the sampling policy.
        single_update = len(mini_batches) == 1 and self.config.epochs == 1 and not self.config.lora.dropout
        grpo_metrics = GrpoMetrics(weight_version)
        with self._stoppable(should_stop):
            fixed_logprobs = [self._fixed_logprobs(batch, pixels, single_update) for batch in mini_batches]
            if len(mini_batches) * self.config.epochs > 1:
                self._snapshot.take()
            for epoch in range(self.config.epochs):
                rng = np.random.default_rng([self.config.seed, self.engine.steps, epoch])
                for index in rng.permutation(len(mini_batches)):
                    mini_batch = mini_batches[index]
                    step_metrics = self._update(mini_batch, fixed_logprobs[index], pixels, grpo_metrics)
                    self._handle_skipped(step_metrics, mini_batch.trajectories, "grpo", weight_version)
        examples = [example for mini_batch in mini_batches for example in mini_batch.examples]
        metrics |= grpo_metrics.compute(self.rank_info)
        if self.config.loss.entropy_target is not None:
            metrics["entropy_coef"] = self._entropy.apply(self.config.loss).entropy_coef
            self._entropy.update(metrics["entropy"], self.config.loss)
        return metrics | self._throughput(examples, started)

    @contextmanager
    def _stoppable(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """Before a micro-batch of the block, if a rank should stop: undo the updates and raise `StepStopped`."""
        rng_state, steps_before = checkpoint.get_rng_state(), self.engine.steps

        def check() -> None:
            if not all_reduce_max(float(should_stop()), self.rank_info):
                return
            if self.engine.steps != steps_before:
                self._snapshot.restore()
            checkpoint.set_rng_state(rng_state)
            raise StepStopped("the step was dropped because a stop was requested")

        with self.micro_batches.checked_by(check):
            yield

    @torch.no_grad()
    def compute_logprobs(self, trajectories: Sequence[Trajectory], pixels: Pixels) -> list[NDArray[np.float32]]:
        """Return the log-probs of each trajectory's sampled tokens under the current weights, `[S]` each."""
        examples = self.encode(trajectories)
        by_index: dict[int, NDArray[np.float32]] = {}
        plan = self.micro_batches.plan(examples)
        with self.micro_batches.load(examples, plan, pixels, self._feature_cache) as batches:
            for batch in batches:
                rows, _ = self.engine(batch)
                for index, row in zip(batch.indices, rows.cpu().numpy(), strict=False):
                    by_index[index] = row[: len(examples[index].sampled_positions)]
        parts = all_gather_object(by_index, self.rank_info)
        merged = {index: row for part in parts for index, row in part.items()}
        return [merged[index] for index in range(len(examples))]

    @torch.no_grad()
    def score_probe(self, probe: ParityProbe) -> ProbeScore:
        """Score a parity probe with the current weights."""
        tokens, device = self.policy.tokens, self.rank_info.device
        example, pixels = encode_probe(probe, tokens, self.image_spec)
        tree = PrefixTree.from_members([0], [example])
        batch = collate([tree], [example], in_memory_pixels(pixels), tokens, self.image_spec, device)
        return ProbeScore(len(probe.expanded_ids), tuple(self.engine(batch)[0][0].tolist()))

    def weight_source(self) -> ZeroWeightSource:
        """Return all weights under their HF names, with adapters merged."""
        return ZeroWeightSource(self.policy.hf, self._offloader)

    def published_source(self) -> WeightSource:
        """Return what engines receive: the adapters or all weights, see `LoraConfig.publish`."""
        if self.config.lora.publishes_adapters:
            return AdapterSource(self.policy.hf, self._offloader)
        return self.weight_source()

    def offload_states(self, *, keep_weights: bool = False) -> int:
        """Move the states to host memory and return the number of bytes; see `StateOffloader.offload`.

        Until `load_states`, only the sources of weights, `save_checkpoint` and `offload_states` may be called.
        """
        return self._offloader.offload(keep_weights=keep_weights)

    def load_states(self) -> int:
        """Move offloaded states back to the device and return the number of bytes."""
        return self._offloader.load()

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write model, optimizer, schedule and random states; see `checkpoint.save_checkpoint`."""
        # A resumed run starts with empty caches. Clear them here too, so that both runs add in the same order.
        for cache in (self._feature_cache, self._reference_cache):
            if cache is not None:
                cache.clear()
        checkpoint.save_checkpoint(
            Path(directory), self.engine, self.rank_info, self.config, self._offloader.on_host, self._entropy
        )

    def load_checkpoint(self, directory: str | Path) -> None:
        """Restore a checkpoint of any world size and ZeRO stage; see `checkpoint.load_checkpoint`."""
        meta = checkpoint.load_checkpoint(Path(directory), self.engine, self.rank_info, self.config)
        if meta.entropy is not None and self.config.loss.entropy_target is not None:
            self._entropy = EntropyController(**meta.entropy)

    def export_hf(self, directory: str | Path) -> None:
        """Write an HF checkpoint directory with tokenizer and processor; see `export.export_hf`."""
        export_hf(Path(directory), self.policy.hf, Path(self.config.model), self.rank_info)

    def _create_feature_cache(self, policy: PolicyModel) -> FeatureCache | None:
        if not self.config.feature_cache_mib:
            return None
        vision = policy.shape.vision
        token_bytes = vision.feature_levels * vision.out_hidden * policy.hf.dtype.itemsize
        return FeatureCache(self.config.feature_cache_mib * 2**20, token_bytes)

    @torch.no_grad()
    def _fixed_logprobs(
        self, mini_batch: MiniBatch, pixels: Pixels, single_update: bool
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return old and reference log-probs of each micro-batch, `[B, S]` on the CPU.

        Old log-probs are None if the forward pass of the update gives them: with a single update, its
        weights are the old weights.
        """

        def compute(model: LogprobFn | None, cache: FeatureCache | None) -> list[Tensor | None]:
            if model is None:
                return [None] * len(mini_batch.micro_batches)
            with self.micro_batches.load(mini_batch.examples, mini_batch.micro_batches, pixels, cache) as batches:
                return [model(batch)[0].cpu() for batch in batches]

        recompute = self.config.old_logprobs == "recompute" and not single_update
        old = compute(self.engine if recompute else None, self._feature_cache)
        return list(zip(old, compute(self.reference_logprobs, self._reference_cache), strict=True))

    def _update(
        self,
        mini_batch: MiniBatch,
        fixed_logprobs: list[tuple[Tensor | None, Tensor | None]],
        pixels: Pixels,
        grpo_metrics: GrpoMetrics,
    ) -> Metrics:
        """Do one optimizer step and return the metrics of the engine."""
        with self.micro_batches.load(
            mini_batch.examples, mini_batch.micro_batches, pixels, self._feature_cache
        ) as batches:
            for batch, (old, reference) in zip(batches, fixed_logprobs, strict=True):
                self._accumulate(mini_batch, batch, old, reference, grpo_metrics)
        step_metrics = self.engine.step()
        grpo_metrics.add_update(step_metrics)
        return step_metrics

    def _accumulate(
        self,
        mini_batch: MiniBatch,
        batch: MicroBatch,
        old: Tensor | None,
        reference: Tensor | None,
        grpo_metrics: GrpoMetrics,
    ) -> None:
        """Add the gradient of one micro-batch."""
        device = self.rank_info.device
        logprobs, entropy = self.engine(batch)
        learner_old = logprobs.detach() if old is None else old.to(device)
        old_logprobs = learner_old
        if self.config.old_logprobs == "engine":
            # External turns have no engine log-probs; the learner's replace them.
            no_engine = batch.engine_logprobs.isnan()
            old_logprobs = torch.where(no_engine, learner_old, batch.engine_logprobs)
        inputs = mini_batch.loss_inputs(batch, old_logprobs, None if reference is None else reference.to(device))
        loss, sums = grpo_loss(logprobs, entropy, inputs, self._entropy.apply(self.config.loss))
        self.engine.backward(loss)
        grpo_metrics.add(sums, logprobs.detach() - old_logprobs, learner_old, batch)

    def _base_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Reference model without a second copy: the policy with its adapters disabled."""
        with adapters_disabled(self.policy.hf):
            logprobs, entropy = self.engine(batch)
        return logprobs, entropy

    def _handle_skipped(
        self,
        step_metrics: Metrics,
        trajectories: Sequence[Trajectory],
        kind: str,
        weight_version: int | None,
    ) -> None:
        """Save the batch of a skipped update.

        Raises:
            UserError: `max_skipped_updates` updates in a row were skipped.
        """
        if not step_metrics["skipped"]:
            return
        skips = self.engine.consecutive_skips
        too_many = skips >= self.config.max_skipped_updates
        saved_batch = None
        if self.config.replay_dir:
            meta = SkippedUpdateMeta(
                kind,
                self.engine.steps,
                weight_version,
                step_metrics["grad_norm"],
                self.rank_info.world_size,
            )
            saved_batch = save_skipped_batch(
                Path(self.config.replay_dir), trajectories, meta, self.config, self.rank_info
            )
            if too_many:
                self.export_hf(saved_batch / MODEL)
        if too_many:
            raise too_many_skips_error(skips, saved_batch)

    def _throughput(self, examples: Sequence[Example], started: float) -> Metrics:
        seconds = time.perf_counter() - started
        tokens = sum(example.length for example in examples)
        rates = {"tokens": float(tokens), "tokens_per_second": tokens / seconds, "seconds": seconds}
        return rates | self.micro_batches.times.metrics()
