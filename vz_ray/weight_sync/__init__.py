"""Weight synchronization: from the learner's module to every engine, complete, verified and versioned.

In: a source of tensors under their HF names. Out: engines that hold exactly these weights; the
others are reported as failed. Must not import Ray, `rollout` or `learner`. Only the `vllm_*` modules
and the NCCL transport import vLLM.
"""

from vz_ray.weight_sync.backends import VLLM_BACKENDS
from vz_ray.weight_sync.engine_client import EngineClient, RemoteEngineClient
from vz_ray.weight_sync.parity_probe import ParityCheck, ParityProbe, build_parity_probe
from vz_ray.weight_sync.publisher import PublishReport, WeightPublisher
from vz_ray.weight_sync.transport import ShmTransport, WeightTransport
from vz_ray.weight_sync.weight_source import CheckpointSource, ModuleSource, WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore
from vz_ray.weight_sync.weight_version import ProbeScore, TensorSpec, WeightManifest, WeightUpdate

__all__ = [
    "VLLM_BACKENDS",
    "CheckpointSource",
    "EngineClient",
    "ModuleSource",
    "ParityCheck",
    "ParityProbe",
    "ProbeScore",
    "PublishReport",
    "RemoteEngineClient",
    "ShmTransport",
    "TensorSpec",
    "WeightIntegrityError",
    "WeightManifest",
    "WeightPublisher",
    "WeightSource",
    "WeightStore",
    "WeightTransport",
    "WeightUpdate",
    "build_parity_probe",
]
