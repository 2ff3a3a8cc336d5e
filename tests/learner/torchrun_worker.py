"""Run `python -m vz_ray.learner` and write the list of imported packages.

torchrun --nproc-per-node 2 -m tests.learner.torchrun_worker OUT sft KEY=VALUE...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.torchrun import main

if __name__ == "__main__":
    status = main(sys.argv[2:])
    imported = sorted({name.partition(".")[0] for name in sys.modules})
    Path(sys.argv[1], f"imported-{os.environ['RANK']}.json").write_text(json.dumps(imported))
    shutdown_distributed()
    sys.exit(status)
