"""The Ray Serve application and its production config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.serve.agent import Agent
from vz_ray.serve.app import AGENT_DEPLOYMENT, build, build_application
from vz_ray.utils.errors import UserError

PRODUCTION = Path("conf/serve/production.yaml")
NEVER = {"config": "conf/serve/tiny.yaml", "model": "assets/tiny-base", "ray.use_gpus": "never"}


def test_production_config_is_valid():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(PRODUCTION.read_text()))
    (app,) = schema.applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    arguments = dict(app.args)
    config = load_config(ServeConfig, arguments.pop("config"), [f"{key}={value}" for key, value in arguments.items()])
    (agent,) = app.deployments
    assert agent.name == AGENT_DEPLOYMENT
    assert set(agent.user_config) == {"model", "version"}
    assert config.model == "", "a change of `args` would restart all replicas"
    assert config.access.keys_file, "it listens on all addresses"


def test_replica_arguments_do_not_depend_on_weights():
    config = load_config(ServeConfig, "conf/serve/tiny.yaml", ["model=assets/tiny-base"])
    other = load_config(ServeConfig, "conf/serve/tiny.yaml", ["model=elsewhere"])
    first, second = (build_application(c, gpus=False, code_version="x") for c in (config, other))
    assert agent_of(first).init_args == agent_of(second).init_args
    assert agent_of(first).init_args[0].model == ""
    assert deployed(first).user_config["model"].endswith("assets/tiny-base")


def test_decoders_open_uploads_and_allowed_dirs_only():
    config = load_config(ServeConfig, None, ["model=m", "files.allowed_dirs=[/media]", "files.directory=/uploads"])
    assert agent_of(build_application(config, gpus=False)).init_args[0].clips.allowed_dirs == [
        "/media",
        "/uploads",
    ]


def test_engine_gpus_follow_config():
    options = deployed(build_application(load_config(ServeConfig, "conf/serve/7b.yaml", ["model=m"]), gpus=True))
    assert options.ray_actor_options["num_gpus"] == 1
    assert deployed(build(NEVER)).ray_actor_options["num_gpus"] == 0


async def test_missing_model_is_refused():
    config = load_config(ServeConfig, "conf/serve/tiny.yaml")
    with pytest.raises(UserError, match="model="):
        build_application(config, gpus=False)
    with pytest.raises(UserError, match="user_config has no model"):
        await Agent(config).reconfigure({"model": "", "version": 0})


def test_weights_may_come_from_the_deployment():
    without = build({key: value for key, value in NEVER.items() if key != "model"})
    with_model = build(NEVER)
    assert deployed(without).user_config == {"model": "", "version": 0}
    assert agent_of(without).init_args == agent_of(with_model).init_args


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("name=a@b", "name is 'a@b'"),
        ("max_replicas=0", "max_replicas is 0; it must be at least min_replicas"),
        ("max_queued_requests=-1", "max_queued_requests is -1"),
        ("engine.max_model_len=99999", "follows episode.max_context"),
        ("access.allowed_hosts=[HTTP://x]", "access.allowed_hosts"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        load_config(ServeConfig, "conf/serve/tiny.yaml", ["model=m", wrong])


def agent_of(app):
    """Return the agent deployment that is bound to the ingress."""
    return app._bound_deployment.init_args[1]._bound_deployment


def deployed(app):
    return agent_of(app)
