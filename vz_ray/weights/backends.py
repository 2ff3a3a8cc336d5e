"""Names of the transports in vLLM's registry."""

BACKENDS = {"shm": "vz_shm", "nccl": "vz_nccl"}
"""Transport in the config -> weight transfer backend in vLLM."""
