"""Trains one model on trajectories, on every rank alike: plain torch.distributed and DeepSpeed.

Each rank is given all trajectories (they carry no pixels), plans the same
micro-batches, and asks for the pixels of its own share alone. One RL
iteration:

    groups -> drop those that teach nothing -> advantages -> minibatches
    each minibatch, before any update:  old log-probs, reference log-probs
    each epoch, each minibatch:         micro-batches: loss, backward; then one optimizer step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner import checkpoint
from vz_ray.learner.advantage import compute_advantages, is_informative
from vz_ray.learner.batch import MicroBatch, PixelLoader, collate, in_memory_pixels
from vz_ray.learner.distributed import all_reduce_sum, init_distributed
from vz_ray.learner.example import Example, encode_trajectory
from vz_ray.learner.export import export_hf
from vz_ray.learner.frame_cache import FeatureCache
from vz_ray.learner.grpo_loss import LossInputs, grpo_loss
from vz_ray.learner.grpo_metrics import GrpoMetrics, Metrics
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.lora import adapters_disabled, add_adapters
from vz_ray.learner.loss import loss_weights
from vz_ray.learner.packing import PrefixTree, plan_micro_batches
from vz_ray.learner.parity_probe import encode_probe
from vz_ray.learner.policy_model import PolicyModel, flop_costs
from vz_ray.learner.replay import MODEL, SkippedUpdateMeta, save_skipped_batch, too_many_skips_error
from vz_ray.learner.train_engine import TrainEngine, prepare_frozen, training_dtype
from vz_ray.learner.weight_source import ZeroWeightSource
from vz_ray.video.frame import RGB
from vz_ray.weight_sync.parity_probe import ParityProbe

LogprobFn = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Gives log-probs and entropies of the sampled tokens, `[B, S]` each."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The trajectories of one optimizer step.

    Attributes:
        examples: All of them, on every rank.
        advantages: One per example.
        loss_weights: One per example, see `trajectory_weights`.
        micro_batches: This rank's micro-batches, as trees of `examples`.
    """

    examples: list[Example]
    advantages: NDArray[np.float64]
    loss_weights: list[float]
    micro_batches: list[list[PrefixTree]]


class Trainer:
    """The model under training; every method must be called on all ranks, with the same arguments.

    Pixels are given as a mapping from digest to array, or as a function that
    fetches those of the refs it is asked for.

    Raises:
        UserError: `config.model` is no checkpoint directory, or has no weights.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.rank_info = init_distributed(config.timeout_s)
        dtype = training_dtype(config, self.rank_info)
        self.policy = PolicyModel.from_pretrained(config.model, dtype, chunk=config.logprob_chunk_tokens)
        self.image_spec = ImageSpec.from_pretrained(config.model)
        self.flop_costs = flop_costs(self.policy.hf)
        self.policy.train()
        if config.gradient_checkpointing:
            self.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
        tower = self.policy.hf.model.visual
        if config.freeze_vision:
            tower.requires_grad_(False)
        if config.lora.rank:
            add_adapters(self.policy.hf, config.lora, config.model, config.seed)
        if not any(p.requires_grad for p in tower.parameters()):
            self.policy.feature_cache = self._new_cache()
        self.engine = TrainEngine(self.policy, config, self.rank_info)
        self.reference_logprobs, self._reference_cache = self._new_reference(dtype)

    def _new_reference(self, dtype: torch.dtype) -> tuple[LogprobFn | None, FeatureCache | None]:
        """The model that KL is measured to, if any, and where its tower's features are kept."""
        config = self.config
        if not config.loss.kl_coef:
            return None, None
        if not config.needs_separate_reference:
            return self._base_logprobs, self.policy.feature_cache
        frozen = PolicyModel.from_pretrained(
            config.reference_model or config.model, dtype, chunk=config.logprob_chunk_tokens
        )
        same_tower = config.reference_model in (None, config.model) and self.policy.feature_cache is not None
        frozen.feature_cache = self.policy.feature_cache if same_tower else self._new_cache()
        return prepare_frozen(frozen, config, self.rank_info), frozen.feature_cache

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        """Trajectories as arrays, checked."""
        return [
            encode_trajectory(trajectory, self.policy.tokens, self.policy.spatial_merge_size)
            for trajectory in trajectories
        ]

    def sft_step(
        self, trajectories: Sequence[Trajectory], pixels: PixelLoader | Mapping[str, RGB]
    ) -> Metrics:
        """One optimizer step of cross-entropy, mean over all the policy's own tokens in the batch."""
        started = time.perf_counter()
        examples = self.encode(trajectories)
        tokens = sum(len(e.sampled_positions) for e in examples)
        nats = 0.0
        for batch in self._micro_batches(
            examples, self._plan_micro_batches(examples), pixels, self.policy.feature_cache
        ):
            logprobs, _ = self.engine(batch, exclude_placeholders=False)
            self.engine.backward(-logprobs.sum() / tokens)
            nats -= float(logprobs.detach().sum())
        updated = self.engine.step()
        self._handle_skipped(updated, trajectories, "sft", None)
        nats = all_reduce_sum({"nats": nats}, self.rank_info)["nats"]
        return {"loss": nats / tokens, **updated, **_speed(examples, started)}

    def grpo_step(
        self,
        groups: Sequence[Group],
        pixels: PixelLoader | Mapping[str, RGB],
        weight_version: int | None = None,
    ) -> Metrics:
        """One iteration of RL: `epochs` passes over the groups, one optimizer step per minibatch.

        `weight_version` is that of the weights as they are now. Tokens sampled from older ones are compared
        with the engine apart (`_stale`), since a difference is no fault there; None takes all for current.

        Groups that teach nothing (see `is_informative`) are left out and
        counted; if none is left, nothing is updated.
        """
        started = time.perf_counter()
        kept = [group for group in groups if is_informative(group, self.config.loss.min_reward_std)]
        metrics: Metrics = {"groups": len(kept), "groups_dropped": len(groups) - len(kept), "updates": 0}
        if not kept:
            return metrics
        minibatches = self._build_mini_batches(kept)
        # With dropout, an update's own pass is not that of the policy that was sampled from.
        once = len(minibatches) == 1 and self.config.epochs == 1 and not self.config.lora.dropout
        given = [self._fixed_logprobs(minibatch, pixels, once) for minibatch in minibatches]
        log = GrpoMetrics(weight_version)
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.config.seed, self.engine.steps, epoch])
            for which in order.permutation(len(minibatches)):
                updated = self._update(minibatches[which], given[which], pixels, log)
                part = kept[which * self.config.mini_batch_size :][: self.config.mini_batch_size]
                self._handle_skipped(
                    updated, [t for g in part for t in g.trajectories], "grpo", weight_version
                )
        examples = [e for minibatch in minibatches for e in minibatch.examples]
        return metrics | log.compute(self.rank_info) | _speed(examples, started)

    @torch.no_grad()
    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], pixels: PixelLoader | Mapping[str, RGB]
    ) -> list[NDArray[np.float32]]:
        """Log-probs of each trajectory's sampled tokens under the present weights, `[S]` each."""
        examples = self.encode(trajectories)
        found: dict[int, NDArray[np.float32]] = {}
        for batch in self._micro_batches(
            examples, self._plan_micro_batches(examples), pixels, self.policy.feature_cache
        ):
            rows, _ = self.engine(batch)
            for index, row in zip(batch.indices, rows.cpu().numpy(), strict=False):
                found[index] = row[: len(examples[index].sampled_positions)]
        parts = [found]
        if self.rank_info.world_size > 1:
            parts = [{} for _ in range(self.rank_info.world_size)]
            dist.all_gather_object(parts, found)
        merged = {index: row for part in parts for index, row in part.items()}
        return [merged[index] for index in range(len(examples))]

    @torch.no_grad()
    def score_probe(self, probe: ParityProbe) -> tuple[float, ...]:
        """Log-probs of a publish's probe under the present weights, at temperature 1."""
        tokens, device = self.policy.tokens, self.rank_info.device
        example, pixels = encode_probe(probe, tokens, self.image_spec)
        spec = self.image_spec.without_size_limits()
        batch = collate(
            [PrefixTree.from_members([0], [example])],
            [example],
            in_memory_pixels(pixels),
            tokens,
            spec,
            device,
        )
        return tuple(self.engine(batch)[0][0].tolist())

    def weight_source(self) -> ZeroWeightSource:
        """The weights under their HF names, for publishing."""
        return ZeroWeightSource(self.policy.hf)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Model, optimizer, schedule and random states; complete or absent. See `checkpoint.save`."""
        # Whoever goes on from here knows no features either: sums of the same terms in the same order.
        for cache in (self.policy.feature_cache, self._reference_cache):
            if cache is not None:
                cache.clear()
        checkpoint.save_checkpoint(Path(directory), self.engine, self.rank_info, self.config)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Goes on from `save_checkpoint`, of whatever ranks and ZeRO stage; see `checkpoint.load`."""
        checkpoint.load_checkpoint(Path(directory), self.engine, self.rank_info, self.config)

    def export_hf(self, directory: str | Path) -> None:
        """An HF checkpoint directory with tokenizer and processor; complete or absent."""
        export_hf(Path(directory), self.policy.hf, Path(self.config.model), self.rank_info)

    def _new_cache(self) -> FeatureCache | None:
        mib = self.config.feature_cache_mib
        return FeatureCache(mib * 2**20) if mib else None

    def _plan_micro_batches(self, examples: Sequence[Example]) -> list[list[PrefixTree]]:
        config, ranks = self.config, self.rank_info.world_size
        dealt = plan_micro_batches(
            examples, config.micro_batch_tokens, ranks, self.flop_costs, share_prefixes=config.share_prefixes
        )
        return dealt[self.rank_info.rank]

    def _micro_batches(
        self,
        examples: Sequence[Example],
        share: list[list[PrefixTree]],
        pixels: PixelLoader | Mapping[str, RGB],
        cache: FeatureCache | None,
    ) -> Iterator[MicroBatch]:
        fetch = in_memory_pixels(pixels) if isinstance(pixels, Mapping) else pixels
        tokens, device = self.policy.tokens, self.rank_info.device
        for trees in share:
            yield collate(trees, examples, fetch, tokens, self.image_spec, device, cache=cache)

    def _build_mini_batches(self, groups: Sequence[Group]) -> list[MiniBatch]:
        size, loss = self.config.mini_batch_size, self.config.loss
        made = []
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            examples = self.encode([t for group in part for t in group.trajectories])
            lengths = [len(e.sampled_positions) for e in examples]
            made.append(
                MiniBatch(
                    examples=examples,
                    advantages=np.concatenate(
                        [compute_advantages(g.rewards, loss.advantage_estimator) for g in part]
                    ),
                    loss_weights=loss_weights(lengths, loss.aggregation, loss.fixed_length),
                    micro_batches=self._plan_micro_batches(examples),
                )
            )
        return made

    @torch.no_grad()
    def _fixed_logprobs(
        self, minibatch: MiniBatch, pixels: PixelLoader | Mapping[str, RGB], once: bool
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Old and reference log-probs of each micro-batch, `[B, S]` on the CPU.

        None stands for old ones that the update's own forward pass will give:
        where there is one update, the weights are still the old ones there.
        """

        def passed(model: LogprobFn | None, cache: FeatureCache | None) -> list[Tensor | None]:
            if model is None:
                return [None] * len(minibatch.micro_batches)
            batches = self._micro_batches(minibatch.examples, minibatch.micro_batches, pixels, cache)
            return [model(batch)[0].cpu() for batch in batches]

        recompute = self.config.old_logprobs == "recompute" and not once
        old = passed(self.engine if recompute else None, self.policy.feature_cache)
        return list(zip(old, passed(self.reference_logprobs, self._reference_cache), strict=True))

    def _update(
        self,
        minibatch: MiniBatch,
        given: list[tuple[Tensor | None, Tensor | None]],
        pixels: PixelLoader | Mapping[str, RGB],
        log: GrpoMetrics,
    ) -> Metrics:
        """One optimizer step; returns what the engine says of it."""
        device = self.rank_info.device
        batches = self._micro_batches(
            minibatch.examples, minibatch.micro_batches, pixels, self.policy.feature_cache
        )
        for batch, (old, reference) in zip(batches, given, strict=True):
            logprobs, entropy = self.engine(batch)
            own = logprobs.detach() if old is None else old.to(device)
            from_engine = self.config.old_logprobs == "engine"
            fixed = LossInputs(
                advantages=self._column(batch, minibatch.advantages),
                weights=self._column(batch, minibatch.loss_weights),
                mask=batch.mask,
                # Turns that no engine sampled have no log-prob of its own; there the learner's stands in.
                old_logprobs=torch.where(batch.engine_logprobs.isnan(), own, batch.engine_logprobs)
                if from_engine
                else own,
                engine_logprobs=batch.engine_logprobs,
                ref_logprobs=None if reference is None else reference.to(device),
            )
            loss, sums = grpo_loss(logprobs, entropy, fixed, self.config.loss)
            self.engine.backward(loss)
            log.add(sums, logprobs.detach() - fixed.old_logprobs, own, batch)
        updated = self.engine.step()
        log.add_update(updated)
        return updated

    def _base_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """What the checkpoint that the adapters sit on says; the reference model, without a second copy."""
        with adapters_disabled(self.policy.hf):
            logprobs, entropy = self.engine(batch)
        return logprobs, entropy

    def _handle_skipped(
        self, updated: Metrics, trajectories: Sequence[Trajectory], kind: str, version: int | None
    ) -> None:
        """Keeps the batch of an update that was skipped.

        Raises:
            UserError: It is the last of `max_skipped` in a row.
        """
        if not updated["skipped"]:
            return
        where, last = None, self.engine.consecutive_skips >= self.config.max_skipped_updates
        if self.config.replay_dir:
            facts = SkippedUpdateMeta(
                kind, self.engine.steps, version, updated["grad_norm"], self.rank_info.world_size
            )
            where = save_skipped_batch(
                Path(self.config.replay_dir), trajectories, facts, self.config, self.rank_info
            )
            if last:
                self.export_hf(where / MODEL)
        if last:
            raise too_many_skips_error(self.engine.consecutive_skips, where)

    def _column(self, batch: MicroBatch, values: Sequence[float] | NDArray[np.float64]) -> Tensor:
        """`[B]` of those values that this micro-batch's trajectories have; 0 in an empty one."""
        chosen = [float(values[index]) for index in batch.indices] or [0.0]
        return torch.tensor(chosen, dtype=torch.float32, device=self.rank_info.device)


def _speed(examples: Sequence[Example], started: float) -> Metrics:
    seconds = time.perf_counter() - started
    tokens = sum(e.length for e in examples)
    return {"tokens": float(tokens), "tokens_per_second": tokens / seconds, "seconds": seconds}
