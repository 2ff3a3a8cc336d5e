"""The Ray Serve application: one ingress in front of agent replicas.

For one machine: `vz-ray serve`. In production: `serve run conf/serve/production.yaml`, or a RayService with
`import_path: vz_ray.serve.app:build`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.serve.agent import Agent
from vz_ray.serve.files_api import upload_directory
from vz_ray.serve.ingress import IngressReplica, configure_ingress_logging
from vz_ray.utils.errors import UserError
from vz_ray.utils.placement import node_group_resources

APP_NAME, AGENT_DEPLOYMENT = "vz_ray", "Agent"
_HEALTH_CHECK_PERIOD_S = 5.0


class AgentReplica(Agent):
    """Agent as a Ray Serve deployment."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, configure_ingress_logging(config))

    async def __del__(self) -> None:
        await self.shutdown()


def build_application(
    config: ServeConfig,
    *,
    gpus: bool,
    version: int = 1,
    code_version: str = "",
    agent_type: type[AgentReplica] = AgentReplica,
) -> serve.Application:
    """Build the application for `config`. Only its weights can change while it runs.

    Args:
        config: Configuration of the server.
        gpus: Reserve GPUs for the engines.
        version: Version number of the weights in `config.model`.
        code_version: Deployments with the same value are updated in place instead of restarted.
        agent_type: Class of the replicas.

    Raises:
        UserError: `config.model` is empty.
    """
    if not config.model:
        raise UserError("model is empty; set the agent's checkpoint directory: model=PATH")
    weights = {"model": str(Path(config.model).resolve()), "version": version}
    return _build(config, weights, gpus=gpus, code_version=code_version, agent_type=agent_type)


def _build(
    config: ServeConfig,
    weights: dict[str, Any],
    *,
    gpus: bool,
    code_version: str = "",
    agent_type: type[AgentReplica] = AgentReplica,
) -> serve.Application:
    """Build the application; empty `weights` come from the `user_config` of its deployment."""
    replica_config = _without_weights(config)
    agent = serve.deployment(agent_type).options(
        name=AGENT_DEPLOYMENT,
        user_config=weights,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.engine.tensor_parallel_size if gpus else 0,
            "resources": node_group_resources(config.node_group),
        },
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=config.timeouts.drain_s,
    )
    capacity = config.max_queued_requests + config.max_ongoing_requests * config.max_replicas
    ingress = serve.deployment(serve.ingress()(IngressReplica)).options(
        name="Ingress", max_ongoing_requests=4 * capacity, ray_actor_options={"num_cpus": 0}
    )
    if code_version:
        # Without it every deployment gets a random version, and Ray Serve restarts all replicas.
        agent._version = ingress._version = code_version
    app: serve.Application = ingress.bind(replica_config, agent.bind(replica_config))
    return app


def build(arguments: dict[str, Any]) -> serve.Application:
    """Entry point of `serve run` and `serve deploy`.

    Without `model`, the weights are those in `user_config` of the deployment `Agent`, whose changes restart no replica;
    Ray Serve restarts all if `args` changes.

    Args:
        arguments: `config`, a YAML file, and overrides of its keys.

    Example: `args: {config: conf/serve/7b.yaml}`
    """
    overrides = dict(arguments)
    file = overrides.pop("config", None)
    config = load_config(ServeConfig, file, [f"{key}={value}" for key, value in overrides.items()])
    gpus = config.ray.use_gpus == "always" or (
        config.ray.use_gpus == "auto" and bool(ray.cluster_resources().get("GPU"))
    )
    if config.model:
        return build_application(config, gpus=gpus)
    return _build(config, {"model": "", "version": 0}, gpus=gpus)


def _without_weights(config: ServeConfig) -> ServeConfig:
    """Return the constructor argument of the replicas. New weights must not change it.

    Decoders may open uploads and the allowed directories, and no other file of the server.
    """
    allowed_dirs = [*config.files.allowed_dirs, str(upload_directory(config.files))]
    return replace(config, model="", clips=replace(config.clips, allowed_dirs=allowed_dirs))
