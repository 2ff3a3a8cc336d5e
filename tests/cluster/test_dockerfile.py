"""Recipes of images: ours are right, and each rule catches what it is for, alone."""

from __future__ import annotations

import re
import tomllib

import pytest

from cluster.manifests.dockerfile import FOLDER, RULES, check_dockerfiles, parse
from cluster.manifests.rules.ray import locked_ray
from cluster.manifests.schema import ROOT

GPU = (FOLDER / "gpu.Dockerfile").read_text()


def test_our_dockerfiles_are_right():
    assert sorted(path.name for path in FOLDER.glob("*.Dockerfile")) == ["cpu.Dockerfile", "gpu.Dockerfile"]
    assert check_dockerfiles() == []


def test_instructions_are_read_with_continued_lines_and_without_comments():
    read = parse("x", "# a\nFROM b\n\nRUN c \\\n    # no\n    && d\nCOPY --chown=1 e f g/\n")
    assert [(one.name, one.line) for one in read.instructions] == [("FROM", 2), ("RUN", 4), ("COPY", 7)]
    assert read.instructions[1].value.split() == ["c", "&&", "d"]
    assert [path for _, path in read.copied()] == ["e", "f"]


BROKEN = {
    "known-instructions": ("CMD [", "ADD https://example.org/a /a\nCMD [", "ADD is not one of"),
    "base-is-pinned": (f"ray:{locked_ray()}-py311-cu130", "ray:latest", "the base is rayproject/ray:latest"),
    "ends-without-root": ("CMD [", "USER root\nCMD [", "the last USER is root"),
    "holds-no-secrets": (
        "PIP_NO_CACHE_DIR=1",
        "PIP_NO_CACHE_DIR=1 HF_TOKEN=x",
        "HF_TOKEN stays in the image",
    ),
    "installs-what-is-locked": ("--constraint /tmp/versions.txt ", "", "takes whatever is newest"),
    "runs-nothing-fetched": (
        "CMD [",
        "RUN curl -sS https://example.org | bash\nCMD [",
        "runs what it fetches",
    ),
    "copies-what-is-there": ("conf conf", "tests tests", ".dockerignore keeps tests out"),
    "is-compiled": ("    && python -m compileall -q vz_ray cluster \\\n", "", "nothing compiles vz_ray"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_recipe_is_caught_by_its_rule_and_no_other(rule):
    old, new, words = BROKEN[rule]
    assert old in GPU
    broken = parse("gpu.Dockerfile", GPU.replace(old, new, 1))
    found = {name: list(check(broken)) for name, check in RULES.items()}
    assert any(words in message for message in found[rule]), found
    assert [name for name, messages in found.items() if messages] == [rule]


def test_every_rule_has_a_broken_recipe():
    assert set(BROKEN) == set(RULES)


def test_the_gpu_image_takes_the_vllm_that_the_project_names():
    [named] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert f"'{named}'" in GPU


def test_both_images_have_the_tags_that_overlays_use():
    tags = {
        tag
        for path in FOLDER.glob("*.Dockerfile")
        for tag in re.findall(r"-t vz-ray:(\S+)", path.read_text())
    }
    used = {
        tag
        for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml")
        for tag in re.findall(r"newTag: (\S+)", path.read_text())
    }
    assert tags == used
