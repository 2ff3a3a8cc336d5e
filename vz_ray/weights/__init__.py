"""Weights: from the learner's module to every engine, complete, checked and versioned.

In: a source of tensors under their HF names. Out: engines that hold exactly
these weights, or that are out of service. Must not know: Ray, the fleet, or
what the weights are for. Nothing here imports vLLM but the plugin, which runs
inside vLLM's processes, and the NCCL sender.
"""

from vz_ray.weights.backends import BACKENDS
from vz_ray.weights.checkpoint_source import CheckpointSource
from vz_ray.weights.publisher import Publisher, PublishReport, Receiver, Sender, ShmSender, Update
from vz_ray.weights.source import ModuleSource, WeightSource
from vz_ray.weights.store import WeightsBroken, WeightStore
from vz_ray.weights.verify import Probe, build_probe, learner_logprobs
from vz_ray.weights.version import Manifest, TensorSpec, WeightVersion

__all__ = [
    "BACKENDS",
    "CheckpointSource",
    "Manifest",
    "ModuleSource",
    "Probe",
    "PublishReport",
    "Publisher",
    "Receiver",
    "Sender",
    "ShmSender",
    "TensorSpec",
    "Update",
    "WeightSource",
    "WeightStore",
    "WeightVersion",
    "WeightsBroken",
    "build_probe",
    "learner_logprobs",
]
