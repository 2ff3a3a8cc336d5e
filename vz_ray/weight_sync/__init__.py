"""Weights: from the learner's module to every engine, complete, checked and versioned.

In: a source of tensors under their HF names. Out: engines that hold exactly
these weights, or that are out of service. Must not know: Ray, the fleet, or
what the weights are for. Nothing here imports vLLM but the plugin, which runs
inside vLLM's processes, and the NCCL sender.
"""

from vz_ray.weight_sync.backends import VLLM_BACKENDS
from vz_ray.weight_sync.checkpoint_source import CheckpointSource
from vz_ray.weight_sync.parity_probe import ParityProbe, build_parity_probe, compute_learner_logprobs
from vz_ray.weight_sync.publisher import (
    PublishReport,
    ShmTransport,
    WeightPublisher,
    WeightReceiver,
    WeightTransport,
    WeightUpdate,
)
from vz_ray.weight_sync.weight_source import ModuleSource, WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore
from vz_ray.weight_sync.weight_version import TensorSpec, WeightManifest, WeightVersion

__all__ = [
    "VLLM_BACKENDS",
    "CheckpointSource",
    "WeightManifest",
    "ModuleSource",
    "ParityProbe",
    "PublishReport",
    "WeightPublisher",
    "WeightReceiver",
    "WeightTransport",
    "ShmTransport",
    "TensorSpec",
    "WeightUpdate",
    "WeightSource",
    "WeightStore",
    "WeightVersion",
    "WeightIntegrityError",
    "build_parity_probe",
    "compute_learner_logprobs",
]
