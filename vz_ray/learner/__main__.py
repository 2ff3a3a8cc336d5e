"""`torchrun --nproc-per-node N -m vz_ray.learner sft ...`; see `learner/torchrun.py`."""

from __future__ import annotations

import sys

from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.torchrun import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        shutdown_distributed()
