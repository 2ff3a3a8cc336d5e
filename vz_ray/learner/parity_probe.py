"""Conversion of a parity probe to the learner's batch format."""

from __future__ import annotations

import numpy as np

from vz_ray.learner.example import Example, SpecialTokenIds
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.video.frame import RGB
from vz_ray.weight_sync.parity_probe import ParityProbe


def encode_probe(probe: ParityProbe, tokens: SpecialTokenIds, spec: ImageSpec) -> tuple[Example, dict[str, RGB]]:
    """Return the probe as an example sampled at temperature 1, and its images by digest.

    Raises:
        ValueError: The model's image processor would resize an image.
    """
    ids = np.asarray([*probe.expanded_ids, *probe.token_ids], dtype=np.int64)
    count = len(probe.token_ids)
    grids = np.asarray([spec.grid(*frame.rgb.shape[:2]) for frame in probe.frames]).reshape(-1, 3)
    visual = grids.prod(axis=1) // spec.merge_size**2
    example = Example(
        name="probe",
        group_id="probe",
        token_ids=ids,
        sampled_positions=np.arange(len(ids) - count, len(ids)),
        engine_logprobs=np.full(count, np.nan, dtype=np.float32),
        temperature=np.ones(count, dtype=np.float32),
        weight_versions=np.full(count, -1, dtype=np.int64),
        after_image=np.ones(count, dtype=np.bool_),
        grids=grids,
        image_starts=np.flatnonzero(ids == tokens.image)[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=tuple(frame.ref for frame in probe.frames),
    )
    return example, {frame.ref.digest: frame.rgb for frame in probe.frames}
