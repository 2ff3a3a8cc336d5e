"""Names shared with vLLM's processes."""

VLLM_BACKENDS = {"shm": "vz_shm", "nccl": "vz_nccl", "ipc": "vz_ipc"}
"""Transport in the config -> weight transfer backend in vLLM's registry."""
ENGINE_ENV_VAR = "VZ_RAY_ENGINE"
"""Set by processes that start an engine and inherited by their children. Without it, the plugin is inert."""
