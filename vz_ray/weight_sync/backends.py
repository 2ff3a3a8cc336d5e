"""Names of the transports in vLLM's registry."""

VLLM_BACKENDS = {"shm": "vz_shm", "nccl": "vz_nccl", "ipc": "vz_ipc"}
"""Transport in the config -> weight transfer backend in vLLM."""


def gpu_fraction(transport: str) -> float:
    """What learner rank and engine each have of a GPU."""
    return 0.5 if transport == "ipc" else 1.0
