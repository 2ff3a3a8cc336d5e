"""What takes long to import: a fork server that has it starts ranks in no time, each in a clean process."""

from __future__ import annotations

import importlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

for name in (
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2.tokenization_qwen2",
    "tests.learner.crash_worker",
):
    importlib.import_module(name)
