"""Staging directories and safetensors files that cannot be written."""

from __future__ import annotations

import errno

import pytest
import torch

from vz_ray.learner.checkpoint_files import staging_dir, write_safetensors
from vz_ray.learner.sft import SINGLE_PROCESS


def test_failed_write_names_the_file_and_deletes_the_staging_directory(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, staging_dir(tmp_path / "out", SINGLE_PROCESS) as staging:
        write_safetensors({"weight": torch.zeros(2)}, staging / "missing/model.safetensors")
    file = tmp_path / ".out.staging/missing/model.safetensors"
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(file))
    assert not list(tmp_path.iterdir())
