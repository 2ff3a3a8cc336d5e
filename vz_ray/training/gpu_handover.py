"""Handover of shared GPUs between engines and learner (`train.colocate`). Rank i and worker i have the same GPU.

    phase      engines                         learner                            memory of a GPU
    rollout    sample                          in host memory                     engine
    sleep      all episodes have ended;
               free weights and KV cache       load all states                    learner
    learn      asleep                          update                             learner, activations
    publish    asleep                          score the probe; all states but    learner
                                               the weights to host memory
               wake the weights                                                   both weights
               receive the weights             export buckets (ipc)               both weights, one bucket
               weights only                    weights to host memory             engine weights
               wake the KV cache, probe        in host memory                     engine

With `weights.transport: shm` the learner writes the version to shared memory and leaves the GPU before the engines
wake: the two sets of weights never meet. The peak is the larger one of an engine and of the learner while it
updates, as long as the two sets of weights and a bucket fit.

Any time the engines have the GPUs, the learner is in host memory. From there it writes checkpoints, and the copy of
the weights that a worker loads when it joins. A stop request in any phase takes effect in the next rollout phase.

    worker lost in its sleep      found by the health check; its replacement starts after the publish
    worker lost in a publish      the other workers get the weights; its replacement starts after the publish
    worker joins                  its engine starts when engines have the GPUs; the next sleep waits for it
    rank lost                     engines sleep, then the learner restarts from its checkpoint and publishes
"""

from __future__ import annotations

from vz_ray.config.run import GrpoRunConfig
from vz_ray.learner.learner import Learner
from vz_ray.monitoring import metric_names
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.weight_sync import PublishReport


class GpuHandover:
    """Hands the GPUs to the learner; a publish hands them back. Does nothing without `train.colocate`."""

    def __init__(self, config: GrpoRunConfig, pool: WorkerPool) -> None:
        self._config, self._pool = config, pool

    async def give_to_learner(self, learner: Learner | None = None) -> None:
        """Let the engines sleep, then load the states of `learner`, unless it starts later. Idempotent.

        Raises:
            StepTimeout: An engine did not free its GPU in time.
            LearnerDiedError: A rank died while it loaded its states.
        """
        if not self._config.train.colocate:
            return
        await self._pool.sleep(self._config.sleep_level)
        if learner is not None:
            await learner.load_states()

    def metrics(self, report: PublishReport | None) -> dict[str, float]:
        """Return the metrics of a publish that woke the engines; none without a publish."""
        if report is None or not self._config.train.colocate:
            return {}
        return {metric_names.WAKE_SECONDS: report.pause_s + report.resume_s}
