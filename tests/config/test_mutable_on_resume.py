"""Keys with which a run may go on otherwise than it began."""

from __future__ import annotations

from vz_ray.config import load_config, to_yaml
from vz_ray.config.run import MUTABLE_ON_RESUME, GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.monitoring.run_dir import RunDir


def test_every_such_key_is_one_and_may_be_changed(tmp_path):
    values = {"node_group": "gpu", "offload": "optimizer", "keep_best": "7"}
    values |= {"gradient_checkpointing": "false", "share_prefixes": "false", "micro_batch_tokens": "65536"}
    changed = [f"{key}={values.get(key.split('.')[1], 1)}" for key in MUTABLE_ON_RESUME]
    for schema, part in ((GrpoRunConfig, "train"), (SftRunConfig, "sft")):
        known = [one for one in changed if one.startswith(("learner.", f"{part}."))]
        begun, now = load_config(schema, None, []), load_config(schema, None, known)
        folder = tmp_path / schema.__name__
        RunDir.create_or_resume(folder, to_yaml(begun), MUTABLE_ON_RESUME)
        assert RunDir.create_or_resume(folder, to_yaml(now), MUTABLE_ON_RESUME)[1]
