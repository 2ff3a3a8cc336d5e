"""The application: an ingress before agents, as Ray Serve deploys it.

By hand: `vz-ray serve`. In production: `serve run conf/serve/production.yaml`, or a RayService, whose
`import_path` is `vz_ray.serve.app:build`.
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
_LOOK_S = 5.0
"""Between two looks whether a replica is well."""


class AgentReplica(Agent):
    """An agent that Ray Serve starts, asks after, and ends."""

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
    """What `config` asks for; only its weights may change while it runs.

    Args:
        config: Of the whole application.
        gpus: Whether engines get GPUs.
        version: Number of the weights in `config.model`.
        code_version: Deployments of the same code and configuration are updated in place, and not started anew.
        agent_type: What replicas are.
    """
    if not config.model:
        raise UserError("serve what? give the agent's checkpoint directory: model=...")
    weights = {"model": str(Path(config.model).resolve()), "version": version}
    fixed = _fixed(config)
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
        health_check_period_s=_LOOK_S,
        graceful_shutdown_timeout_s=config.timeouts.drain_s,
    )
    ingress = serve.deployment(serve.ingress()(IngressReplica)).options(
        name="Ingress",
        max_ongoing_requests=4
        * (config.max_queued_requests + config.max_ongoing_requests * config.max_replicas),
        ray_actor_options={"num_cpus": 0},
    )
    if code_version:
        # Else each call would make a version of its own, and start every replica anew.
        agent._version = ingress._version = code_version
    app: serve.Application = ingress.bind(fixed, agent.bind(fixed))
    return app


def build(arguments: dict[str, Any]) -> serve.Application:
    """For `serve run` and `serve deploy`: arguments `config` (a file) and further keys of it.

    Example: `args: {config: conf/serve/7b.yaml, model: /models/agent}`
    """
    given = dict(arguments)
    file = given.pop("config", None)
    config = load_config(ServeConfig, file, [f"{key}={value}" for key, value in given.items()])
    gpus = config.ray.use_gpus == "always" or (
        config.ray.use_gpus == "auto" and bool(ray.cluster_resources().get("GPU"))
    )
    return build_application(config, gpus=gpus)


def _fixed(config: ServeConfig) -> ServeConfig:
    """What replicas are made from: without the weights, so that others do not make other replicas.

    Decoders may open uploads and what requests may name, and no other file of the server's.
    """
    roots = [*config.files.allowed_dirs, str(upload_directory(config.files))]
    return replace(config, model="", clips=replace(config.clips, allowed_dirs=roots))
