"""The random generators of a rank, as JSON."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor


def get_rng_state() -> dict[str, Any]:
    """The generators of this process: Python's, NumPy's, torch's on the CPU and on this rank's GPU."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undoes `random_state`; a GPU that the state knows nothing of is left as it is."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def seed_from_rank0(state: dict[str, Any], rank: int) -> None:
    """Seeds the generators of a rank that has no saved state, from rank 0's: always in the same way."""
    digest = blake3(f"{json.dumps(state)}/{rank}".encode()).digest(8)
    seed = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
