"""Images and tolerance of the parity probe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from vz_ray.learner.image_patches import ImageSpec
from vz_ray.weight_sync import ParityCheck, ParityProbe, ProbeScore, WeightIntegrityError, build_parity_probe
from vz_ray.weight_sync.parity_probe import ProbeGap

PROBE = ParityProbe((1,), (1,), (), (2, 3))
EXPECTED = ProbeScore(1, (-1.0, -2.0))


@pytest.mark.parametrize(
    ("patch_size", "min_pixels", "max_pixels"),
    [
        (14, 784, 1 << 40),
        (14, 3136, 12_845_056),  # Qwen2.5-VL
        (16, 65_536, 16_777_216),  # Qwen3-VL
        (14, 784, 1568),
        (14, 784, 784),
    ],
)
def test_images_are_within_the_bounds_of_the_processor(patch_size: int, min_pixels: int, max_pixels: int) -> None:
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor = SimpleNamespace(patch_size=patch_size, merge_size=2, size=size)
    probe = build_parity_probe(AutoTokenizer.from_pretrained("assets/tiny-base"), processor)
    spec = ImageSpec(patch_size, 2, 2, (0.0,) * 3, (1.0,) * 3, min_pixels, max_pixels, 1.0)
    grids = [spec.grid(*frame.rgb.shape[:2]) for frame in probe.frames]
    assert len(set(grids)) == len(grids) >= 1
    visual = sum(rows * columns // 4 for _, rows, columns in grids)
    assert len(probe.expanded_ids) == len(probe.compact_ids) - len(grids) + visual


def test_first_gap_sets_the_tolerance() -> None:
    check = ParityCheck(PROBE, dtype="bfloat16")
    assert check.max_gap == 0.15
    check.compare("a", 1, EXPECTED, ProbeScore(1, (-1.1, -2.1)))
    check.calibrate(ProbeGap(0.01, 0.0))
    check.calibrate(ProbeGap(0.1, 0.0))
    assert check.max_gap == pytest.approx(0.05)
    with pytest.raises(WeightIntegrityError, match=r"differ from the learner's by 0\.1 on average"):
        check.compare("a", 2, EXPECTED, ProbeScore(1, (-1.1, -2.1)))


def test_one_large_difference_exceeds_the_kl() -> None:
    expected = ProbeScore(1, (-1.0,) * 16)
    with pytest.raises(WeightIntegrityError, match="with a KL of"):
        ParityCheck(PROBE, dtype="bfloat16").compare("a", 1, expected, ProbeScore(1, (*expected.logprobs[:15], -3.2)))


@pytest.mark.parametrize(("gap", "tolerance"), [(0.0, 0.03), (0.02, 0.1), (0.14, 0.15)])
def test_tolerance_stays_between_floor_and_ceiling(gap: float, tolerance: float) -> None:
    check = ParityCheck(PROBE, dtype="bfloat16")
    check.calibrate(ProbeGap(gap, 0.0))
    assert check.max_gap == pytest.approx(tolerance)


def test_resumed_run_keeps_continuation_and_tolerance(tmp_path: Path) -> None:
    file = tmp_path / "parity_probe.json"
    first = ParityCheck(PROBE, dtype="bfloat16", file=file)
    first.continue_with((7, 8))
    first.calibrate(ProbeGap(0.01, 0.0))
    resumed = ParityCheck(PROBE, dtype="bfloat16", file=file)
    assert (resumed.probe, resumed.max_gap, resumed.is_continued) == (first.probe, first.max_gap, True)
    assert ParityCheck(PROBE, dtype="float32", file=file).max_gap == 1e-4, "another dtype is calibrated again"
