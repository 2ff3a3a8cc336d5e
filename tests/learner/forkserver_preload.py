"""Slow imports, preloaded by the fork server so that rank processes start quickly."""

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
