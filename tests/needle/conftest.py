"""Needle tasks and the tokenizer of the tiny model."""

from __future__ import annotations

import pytest

from tests.needle.tiny_setup import make_train_tasks
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.tiny_model import build_tokenizer


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Tasks of every kind on four videos of two lengths."""
    return make_train_tasks(tmp_path_factory.mktemp("needle"), videos=4, shot_s=[4, 16])


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(make_tokenizer_corpus(), 1792)
