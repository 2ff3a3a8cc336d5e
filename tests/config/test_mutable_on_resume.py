"""Keys that may change when a run is resumed."""

from __future__ import annotations

from vz_ray.config import load_config, to_yaml
from vz_ray.config.run import MUTABLE_ON_RESUME, GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.timeouts import PLANNED_TIMEOUTS
from vz_ray.monitoring.run_dir import RunDir


def test_every_mutable_key_may_change_on_resume(tmp_path):
    values = {"node_group": "gpu", "offload": "optimizer", "keep_best": "7", "lora": "merged"}
    values |= {"gradient_checkpointing": "false", "share_prefixes": "false", "micro_batch_tokens": "65536"}
    values |= dict.fromkeys(PLANNED_TIMEOUTS, "900")
    changed = [f"{key}={values.get(key.split('.')[1], 1)}" for key in MUTABLE_ON_RESUME]
    for schema, part in ((GrpoRunConfig, "train"), (SftRunConfig, "sft")):
        overrides = [override for override in changed if override.startswith(("learner.", "timeouts.", f"{part}."))]
        initial, resumed = load_config(schema, None, []), load_config(schema, None, overrides)
        folder = tmp_path / schema.__name__
        RunDir.create_or_resume(folder, to_yaml(initial), MUTABLE_ON_RESUME)
        assert RunDir.create_or_resume(folder, to_yaml(resumed), MUTABLE_ON_RESUME)[1]
