"""Trains one model on trajectories, on every rank alike: plain torch.distributed and DeepSpeed.

Each rank is given all trajectories (they carry no pixels), plans the same
micro-batches, and asks for the pixels of its own share alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from vz_ray.config.learner import LearnerConfig
from vz_ray.episode.trajectory import Trajectory
from vz_ray.learner.batch import Example, MicroBatch, Pixels, collate, encode, frames_of, plan
from vz_ray.learner.distributed import join, total
from vz_ray.learner.engine import Engine, training_dtype
from vz_ray.learner.model import Policy
from vz_ray.learner.pixels import PixelSpec
from vz_ray.video.frame import RGB

Metrics = dict[str, float]


class Trainer:
    """The model under training; every method must be called on all ranks, with the same arguments.

    Pixels are given as a mapping from digest to array, or as a function that
    fetches those of the refs it is asked for.

    Raises:
        FileNotFoundError: `config.model` is no checkpoint directory, or has no weights.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.place = join(config.deadline_s)
        self.dtype = training_dtype(config, self.place)
        self.spec = PixelSpec.of_checkpoint(config.model)
        self.policy = Policy.load(config.model, self.dtype, chunk=config.logprob_chunk_tokens)
        self.policy.train()
        if config.gradient_checkpointing:
            self.policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
        if config.freeze_vision:
            self.policy.hf.model.visual.requires_grad_(False)
        self.engine = Engine(self.policy, config, self.place)

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Example]:
        """Trajectories as arrays, checked."""
        return [encode(trajectory, self.policy.tokens, self.policy.merge) for trajectory in trajectories]

    def sft_step(self, trajectories: Sequence[Trajectory], pixels: Pixels | Mapping[str, RGB]) -> Metrics:
        """One optimizer step of cross-entropy, mean over all the policy's own tokens in the batch."""
        started = time.perf_counter()
        examples = self.encode(trajectories)
        tokens = sum(len(e.sampled) for e in examples)
        nats = 0.0
        for batch in self._micro_batches(examples, pixels):
            logprobs, _ = self.engine(batch, ban=False)
            self.engine.backward(-logprobs.sum() / tokens)
            nats -= float(logprobs.detach().sum())
        updated = self.engine.step()
        nats = total({"nats": nats}, self.place)["nats"]
        return {"loss": nats / tokens, **updated, **self._speed(examples, started)}

    @torch.no_grad()
    def logprobs(
        self, trajectories: Sequence[Trajectory], pixels: Pixels | Mapping[str, RGB]
    ) -> list[np.ndarray]:
        """Log-probs of each trajectory's sampled tokens under the present weights, `float32 [S]` each."""
        examples = self.encode(trajectories)
        found = self._per_example(self.engine, examples, pixels)
        return [found[i] for i in range(len(examples))]

    def _micro_batches(
        self, examples: Sequence[Example], pixels: Pixels | Mapping[str, RGB]
    ) -> Iterator[MicroBatch]:
        """This rank's share, in as many steps as every other rank's."""
        fetch = frames_of(pixels) if isinstance(pixels, Mapping) else pixels
        shares = plan(examples, self.config.micro_batch_tokens, self.place.world)
        for indices in shares[self.place.rank]:
            yield collate(indices, examples, fetch, self.policy.tokens, self.spec, self.place.device)

    def _speed(self, examples: Sequence[Example], started: float) -> Metrics:
        seconds = time.perf_counter() - started
        tokens = sum(e.length for e in examples)
        return {"tokens": float(tokens), "tokens_per_s": tokens / seconds, "seconds": seconds}
