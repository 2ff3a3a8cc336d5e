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
from vz_ray.episode.trajectory import Group, Trajectory
from vz_ray.learner import checkpoint
from vz_ray.learner.advantage import advantages, is_informative
from vz_ray.learner.batch import MicroBatch, Pixels, collate, frames_of
from vz_ray.learner.distributed import join, total
from vz_ray.learner.engine import Engine, freeze, training_dtype
from vz_ray.learner.example import Example, encode
from vz_ray.learner.export import export_hf
from vz_ray.learner.features import FeatureCache
from vz_ray.learner.iteration_log import IterationLog, Metrics
from vz_ray.learner.lora import adapt, without_adapters
from vz_ray.learner.loss import trajectory_weights
from vz_ray.learner.model import Policy, costs_of
from vz_ray.learner.objective import Given, objective
from vz_ray.learner.packing import Tree, plan
from vz_ray.learner.pixels import PixelSpec
from vz_ray.learner.probe import probe_example
from vz_ray.learner.replay import MODEL, Facts, keep_batch, too_many_skipped
from vz_ray.learner.weights import TrainerSource
from vz_ray.video.frame import RGB
from vz_ray.weights.verify import Probe

Model = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""Gives log-probs and entropies of the sampled tokens, `[B, S]` each."""


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The trajectories of one optimizer step.

    Attributes:
        examples: All of them, on every rank.
        advantage: One per example.
        weight: One per example, see `trajectory_weights`.
        share: This rank's micro-batches, as trees of `examples`.
    """

    examples: list[Example]
    advantage: NDArray[np.float64]
    weight: list[float]
    share: list[list[Tree]]


class Trainer:
    """The model under training; every method must be called on all ranks, with the same arguments.

    Pixels are given as a mapping from digest to array, or as a function that
    fetches those of the refs it is asked for.

    Raises:
        UserError: `config.model` is no checkpoint directory, or has no weights.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.place = join(config.deadline_s)
        dtype = training_dtype(config, self.place)
        self.policy = Policy.load(config.model, dtype, chunk=config.logprob_chunk_tokens)
        self.spec = PixelSpec.of_checkpoint(config.model)
        self.costs = costs_of(self.policy.hf)
        self.policy.train()
        if config.gradient_checkpointing:
            self.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
        tower = self.policy.hf.model.visual
        if config.freeze_vision:
            tower.requires_grad_(False)
        if config.lora.rank:
            adapt(self.policy.hf, config.lora, config.model, config.seed)
        if not any(p.requires_grad for p in tower.parameters()):
            self.policy.cache = self._new_cache()
        self.engine = Engine(self.policy, config, self.place)
        self.reference, self._reference_cache = self._new_reference(dtype)

    def _new_reference(self, dtype: torch.dtype) -> tuple[Model | None, FeatureCache | None]:
        """The model that KL is measured to, if any, and where its tower's features are kept."""
        config = self.config
        if not config.loss.kl:
            return None, None
        if not config.own_reference:
            return self._unadapted, self.policy.cache
        frozen = Policy.load(config.reference or config.model, dtype, chunk=config.logprob_chunk_tokens)
        same_tower = config.reference in (None, config.model) and self.policy.cache is not None
        frozen.cache = self.policy.cache if same_tower else self._new_cache()
        return freeze(frozen, config, self.place), frozen.cache

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        """Trajectories as arrays, checked."""
        return [encode(trajectory, self.policy.tokens, self.policy.merge) for trajectory in trajectories]

    def sft_step(self, trajectories: Sequence[Trajectory], pixels: Pixels | Mapping[str, RGB]) -> Metrics:
        """One optimizer step of cross-entropy, mean over all the policy's own tokens in the batch."""
        started = time.perf_counter()
        examples = self.encode(trajectories)
        tokens = sum(len(e.sampled) for e in examples)
        nats = 0.0
        for batch in self._micro_batches(examples, self._share(examples), pixels, self.policy.cache):
            logprobs, _ = self.engine(batch, ban=False)
            self.engine.backward(-logprobs.sum() / tokens)
            nats -= float(logprobs.detach().sum())
        updated = self.engine.step()
        self._keep_if_skipped(updated, trajectories, "sft", None)
        nats = total({"nats": nats}, self.place)["nats"]
        return {"loss": nats / tokens, **updated, **_speed(examples, started)}

    def grpo_step(
        self,
        groups: Sequence[Group],
        pixels: Pixels | Mapping[str, RGB],
        version: int | None = None,
    ) -> Metrics:
        """One iteration of RL: `epochs` passes over the groups, one optimizer step per minibatch.

        `version` is that of the weights as they are now. Tokens sampled from older ones are compared
        with the engine apart (`_stale`), since a difference is no fault there; None takes all for current.

        Groups that teach nothing (see `is_informative`) are left out and
        counted; if none is left, nothing is updated.
        """
        started = time.perf_counter()
        kept = [group for group in groups if is_informative(group, self.config.loss.min_reward_std)]
        metrics: Metrics = {"groups": len(kept), "groups_dropped": len(groups) - len(kept), "updates": 0}
        if not kept:
            return metrics
        minibatches = self._minibatches(kept)
        # With dropout, an update's own pass is not that of the policy that was sampled from.
        once = len(minibatches) == 1 and self.config.epochs == 1 and not self.config.lora.dropout
        given = [self._given(minibatch, pixels, once) for minibatch in minibatches]
        log = IterationLog(version)
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.config.seed, self.engine.steps, epoch])
            for which in order.permutation(len(minibatches)):
                updated = self._update(minibatches[which], given[which], pixels, log)
                part = kept[which * self.config.minibatch_tasks :][: self.config.minibatch_tasks]
                self._keep_if_skipped(updated, [t for g in part for t in g.trajectories], "grpo", version)
        examples = [e for minibatch in minibatches for e in minibatch.examples]
        return metrics | log.metrics(self.place) | _speed(examples, started)

    @torch.no_grad()
    def logprobs(
        self, trajectories: Sequence[Trajectory], pixels: Pixels | Mapping[str, RGB]
    ) -> list[NDArray[np.float32]]:
        """Log-probs of each trajectory's sampled tokens under the present weights, `[S]` each."""
        examples = self.encode(trajectories)
        found: dict[int, NDArray[np.float32]] = {}
        for batch in self._micro_batches(examples, self._share(examples), pixels, self.policy.cache):
            rows, _ = self.engine(batch)
            for index, row in zip(batch.indices, rows.cpu().numpy(), strict=False):
                found[index] = row[: len(examples[index].sampled)]
        parts = [found]
        if self.place.world > 1:
            parts = [{} for _ in range(self.place.world)]
            dist.all_gather_object(parts, found)
        merged = {index: row for part in parts for index, row in part.items()}
        return [merged[index] for index in range(len(examples))]

    @torch.no_grad()
    def score(self, probe: Probe) -> tuple[float, ...]:
        """Log-probs of a publish's probe under the present weights, at temperature 1."""
        tokens, device = self.policy.tokens, self.place.device
        example, pixels = probe_example(probe, tokens, self.spec)
        spec = self.spec.unbounded()
        batch = collate([Tree.of([0], [example])], [example], frames_of(pixels), tokens, spec, device)
        return tuple(self.engine(batch)[0][0].tolist())

    def source(self) -> TrainerSource:
        """The weights under their HF names, for publishing."""
        return TrainerSource(self.policy.hf)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Model, optimizer, schedule and random states; complete or absent. See `checkpoint.save`."""
        # Whoever goes on from here knows no features either: sums of the same terms in the same order.
        for cache in (self.policy.cache, self._reference_cache):
            if cache is not None:
                cache.clear()
        checkpoint.save(Path(directory), self.engine, self.place, self.config)

    def load_checkpoint(self, directory: str | Path) -> None:
        """Goes on from `save_checkpoint`, of whatever ranks and ZeRO stage; see `checkpoint.load`."""
        checkpoint.load(Path(directory), self.engine, self.place, self.config)

    def export_hf(self, directory: str | Path) -> None:
        """An HF checkpoint directory with tokenizer and processor; complete or absent."""
        export_hf(Path(directory), self.policy.hf, Path(self.config.model), self.place)

    def _new_cache(self) -> FeatureCache | None:
        mib = self.config.feature_cache_mib
        return FeatureCache(mib * 2**20) if mib else None

    def _share(self, examples: Sequence[Example]) -> list[list[Tree]]:
        config, ranks = self.config, self.place.world
        dealt = plan(examples, config.micro_batch_tokens, ranks, self.costs, share=config.share_prefixes)
        return dealt[self.place.rank]

    def _micro_batches(
        self,
        examples: Sequence[Example],
        share: list[list[Tree]],
        pixels: Pixels | Mapping[str, RGB],
        cache: FeatureCache | None,
    ) -> Iterator[MicroBatch]:
        fetch = frames_of(pixels) if isinstance(pixels, Mapping) else pixels
        tokens, device = self.policy.tokens, self.place.device
        for trees in share:
            yield collate(trees, examples, fetch, tokens, self.spec, device, cache=cache)

    def _minibatches(self, groups: Sequence[Group]) -> list[Minibatch]:
        size, loss = self.config.minibatch_tasks, self.config.loss
        made = []
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            examples = self.encode([t for group in part for t in group.trajectories])
            lengths = [len(e.sampled) for e in examples]
            made.append(
                Minibatch(
                    examples=examples,
                    advantage=np.concatenate([advantages(g.rewards, loss.advantage) for g in part]),
                    weight=trajectory_weights(lengths, loss.aggregation, loss.fixed_length),
                    share=self._share(examples),
                )
            )
        return made

    @torch.no_grad()
    def _given(
        self, minibatch: Minibatch, pixels: Pixels | Mapping[str, RGB], once: bool
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Old and reference log-probs of each micro-batch, `[B, S]` on the CPU.

        None stands for old ones that the update's own forward pass will give:
        where there is one update, the weights are still the old ones there.
        """

        def passed(model: Model | None, cache: FeatureCache | None) -> list[Tensor | None]:
            if model is None:
                return [None] * len(minibatch.share)
            batches = self._micro_batches(minibatch.examples, minibatch.share, pixels, cache)
            return [model(batch)[0].cpu() for batch in batches]

        recompute = self.config.old_logprobs == "recompute" and not once
        old = passed(self.engine if recompute else None, self.policy.cache)
        return list(zip(old, passed(self.reference, self._reference_cache), strict=True))

    def _update(
        self,
        minibatch: Minibatch,
        given: list[tuple[Tensor | None, Tensor | None]],
        pixels: Pixels | Mapping[str, RGB],
        log: IterationLog,
    ) -> Metrics:
        """One optimizer step; returns what the engine says of it."""
        device = self.place.device
        batches = self._micro_batches(minibatch.examples, minibatch.share, pixels, self.policy.cache)
        for batch, (old, reference) in zip(batches, given, strict=True):
            logprobs, entropy = self.engine(batch)
            own = logprobs.detach() if old is None else old.to(device)
            from_engine = self.config.old_logprobs == "engine"
            fixed = Given(
                advantage=self._column(batch, minibatch.advantage),
                weight=self._column(batch, minibatch.weight),
                mask=batch.mask,
                # Turns that no engine sampled have no log-prob of its own; there the learner's stands in.
                old=torch.where(batch.engine_logprobs.isnan(), own, batch.engine_logprobs)
                if from_engine
                else own,
                engine=batch.engine_logprobs,
                reference=None if reference is None else reference.to(device),
            )
            loss, sums = objective(logprobs, entropy, fixed, self.config.loss)
            self.engine.backward(loss)
            log.add(sums, logprobs.detach() - fixed.old, own, batch)
        updated = self.engine.step()
        log.updated(updated)
        return updated

    def _unadapted(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """What the checkpoint that the adapters sit on says; the reference model, without a second copy."""
        with without_adapters(self.policy.hf):
            logprobs, entropy = self.engine(batch)
        return logprobs, entropy

    def _keep_if_skipped(
        self, updated: Metrics, trajectories: Sequence[Trajectory], kind: str, version: int | None
    ) -> None:
        """Keeps the batch of an update that was skipped.

        Raises:
            UserError: It is the last of `max_skipped` in a row.
        """
        if not updated["skipped"]:
            return
        where, last = None, self.engine.skipped >= self.config.max_skipped
        if self.config.replay:
            facts = Facts(kind, self.engine.steps, version, updated["grad_norm"], self.place.world)
            where = keep_batch(Path(self.config.replay), trajectories, facts, self.config, self.place)
            if last:
                self.export_hf(where / MODEL)
        if last:
            raise too_many_skipped(self.engine.skipped, where)

    def _column(self, batch: MicroBatch, values: Sequence[float] | NDArray[np.float64]) -> Tensor:
        """`[B]` of those values that this micro-batch's trajectories have; 0 in an empty one."""
        chosen = [float(values[index]) for index in batch.indices] or [0.0]
        return torch.tensor(chosen, dtype=torch.float32, device=self.place.device)


def _speed(examples: Sequence[Example], started: float) -> Metrics:
    seconds = time.perf_counter() - started
    tokens = sum(e.length for e in examples)
    return {"tokens": float(tokens), "tokens_per_s": tokens / seconds, "seconds": seconds}
