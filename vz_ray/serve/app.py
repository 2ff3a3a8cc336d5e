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

from vz_ray.config import load
from vz_ray.config.serve import ServeConfig
from vz_ray.observe.errors import UserError
from vz_ray.observe.place import of_group
from vz_ray.serve.agent import Agent
from vz_ray.serve.files import upload_directory
from vz_ray.serve.ingress import IngressReplica, begin_log

APP, AGENT = "vz_ray", "Agent"
_LOOK_S = 5.0
"""Between two looks whether a replica is well."""


class AgentReplica(Agent):
    """An agent that Ray Serve starts, asks after, and ends."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(config, begin_log(config))

    async def __del__(self) -> None:
        await self.shutdown()


def application(
    config: ServeConfig,
    *,
    gpus: bool,
    version: int = 1,
    code: str = "",
    agent_type: type[AgentReplica] = AgentReplica,
) -> serve.Application:
    """What `config` asks for; only its weights may change while it runs.

    Args:
        config: Of the whole application.
        gpus: Whether engines get GPUs.
        version: Number of the weights in `config.model`.
        code: Deployments of the same code and configuration are updated in place, and not started anew.
        agent_type: What replicas are.
    """
    if not config.model:
        raise UserError("serve what? give the agent's checkpoint directory: model=...")
    weights = {"model": str(Path(config.model).resolve()), "version": version}
    fixed = _fixed(config)
    agent = serve.deployment(agent_type).options(
        name=AGENT,
        user_config=weights,
        max_ongoing_requests=config.requests_per_replica,
        max_queued_requests=config.queue,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_requests,
        },
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.engine.tensor_parallel if gpus else 0,
            "resources": of_group(config.group),
        },
        health_check_period_s=_LOOK_S,
        graceful_shutdown_timeout_s=config.drain_s,
    )
    ingress = serve.deployment(serve.ingress()(IngressReplica)).options(
        name="Ingress",
        max_ongoing_requests=4 * (config.queue + config.requests_per_replica * config.max_replicas),
        ray_actor_options={"num_cpus": 0},
    )
    if code:
        # Else each call would make a version of its own, and start every replica anew.
        agent._version = ingress._version = code
    app: serve.Application = ingress.bind(fixed, agent.bind(fixed))
    return app


def build(arguments: dict[str, Any]) -> serve.Application:
    """For `serve run` and `serve deploy`: arguments `config` (a file) and further keys of it.

    Example: `args: {config: conf/serve/7b.yaml, model: /models/agent}`
    """
    given = dict(arguments)
    file = given.pop("config", None)
    config = load(ServeConfig, file, [f"{key}={value}" for key, value in given.items()])
    gpus = config.ray.gpus == "always" or (
        config.ray.gpus == "auto" and bool(ray.cluster_resources().get("GPU"))
    )
    return application(config, gpus=gpus)


def _fixed(config: ServeConfig) -> ServeConfig:
    """What replicas are made from: without the weights, so that others do not make other replicas.

    Decoders may open uploads and what requests may name, and no other file of the server's.
    """
    roots = [*config.files.roots, str(upload_directory(config.files))]
    return replace(config, model="", clips=replace(config.clips, roots=roots))
