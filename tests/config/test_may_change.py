"""Keys with which a run may go on otherwise than it began."""

from __future__ import annotations

from vz_ray.config import load, to_yaml
from vz_ray.config.run import MAY_CHANGE, RunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.observe.run_dir import RunDir


def test_every_such_key_is_one_and_may_be_changed(tmp_path):
    values = {"group": "gpu", "offload": "optimizer", "keep_best": "7"}
    values |= {"gradient_checkpointing": "false", "share_prefixes": "false", "micro_batch_tokens": "65536"}
    changed = [f"{key}={values.get(key.split('.')[1], 1)}" for key in MAY_CHANGE]
    for schema, part in ((RunConfig, "train"), (SftRunConfig, "sft")):
        known = [one for one in changed if one.startswith(("learner.", f"{part}."))]
        begun, now = load(schema, None, []), load(schema, None, known)
        folder = tmp_path / schema.__name__
        RunDir.begin(folder, to_yaml(begun), MAY_CHANGE)
        assert RunDir.begin(folder, to_yaml(now), MAY_CHANGE)[1]
