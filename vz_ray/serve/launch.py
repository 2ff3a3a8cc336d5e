"""`vz-ray serve`, `roll` and `ask`: an agent for programs, other weights for it, one question by hand.

serve: Ray and Ray Serve on this machine, until Ctrl-C    server.json: where it listens, what it has held
roll:  joins that Ray, deploys the same application with other weights; replicas exchange them in place
ask:   a running server by HTTP, or an engine of its own for one question
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from rich.console import Console

from vz_ray.config import load_config, to_yaml
from vz_ray.config.serve import ServeConfig
from vz_ray.monitoring import logging_config
from vz_ray.runtime import runtime
from vz_ray.serve.access_control import is_loopback
from vz_ray.serve.api_keys import ApiKeyStore
from vz_ray.serve.app import AGENT_DEPLOYMENT, APP_NAME, AgentReplica, build_application
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, restore_signal_handlers

STATE_FILE, CONFIG_FILE = "server.json", "config.yaml"
STARTUP_INTERRUPTED_HINT = (
    "it had not begun to serve, and a server keeps nothing; the same command starts it anew"
)


@dataclass(frozen=True, slots=True)
class ServerState:
    """A server that runs, as `server.json` in its logs tells it.

    Attributes:
        url: Where it listens.
        ray: Address of its Ray cluster.
        pid: Of the process that started it.
        history: Checkpoints in the order of their versions, the first of them 1.
    """

    url: str
    ray: str
    pid: int
    history: tuple[str, ...]

    @property
    def version(self) -> int:
        return len(self.history)

    def write(self, folder: Path) -> None:
        write_atomic(folder / STATE_FILE, json.dumps(asdict(self), indent=1).encode())


def run_serve(config: ServeConfig) -> None:
    """Serves until Ctrl-C.

    Raises:
        UserError: There is no model, the port is taken, or there are no keys where there must be.
    """
    check_config(config)
    asyncio.run(_serve(config))


def check_config(config: ServeConfig) -> None:
    """What can be said before anything is started."""
    resolve_checkpoint(config.model)
    keys = ApiKeyStore.from_config(config.access.keys_file, config.access.keys_env, os.environ)
    if keys is None and not is_loopback(config.host):
        raise UserError(
            f"host {config.host} can be reached by others, and there are no API keys: make one with "
            "`vz-ray keys create NAME --file keys.json` and set access.keys_file=keys.json, or listen on 127.0.0.1"
        )
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as knock:
        knock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            knock.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}): choose another port=..., "
                "or 0 for a free one"
            ) from error


def resolve_checkpoint(model: str) -> str:
    """The absolute path of a checkpoint; raises `UserError` where there is none."""
    if not model or not list(Path(model).glob("*.safetensors")):
        raise UserError(f"there is no checkpoint at {model!r}; give the agent's directory: model=...")
    return os.path.abspath(model)


async def _serve(config: ServeConfig) -> None:
    folder = Path(config.log_dir)
    logging_config.configure_logging(folder, identity=runtime.run_identity(config))
    console = Console(highlight=False)
    with Interrupt(resume_hint=STARTUP_INTERRUPTED_HINT) as interrupt:
        async with AsyncExitStack() as stack:
            with console.status(f"starting an engine on {config.model} (logs: {folder}) ..."):
                serving = await interrupt.run_interruptible(stack.enter_async_context(running_server(config)))
            console.print(
                f"[bold]{config.name}[/] answers at [bold]{serving.url}[/]  (page, and /v1 for clients)"
            )
            console.print(f"  model   {config.model}")
            console.print(f"  logs    {folder}")
            console.print(f"  curl {serving.url}/v1/models     Ctrl-C ends it")
            await interrupt.wait_requested()
            console.print("ending: requests under way are finished first")


@asynccontextmanager
async def running_server(
    config: ServeConfig, agent_type: type[AgentReplica] = AgentReplica
) -> AsyncIterator[ServerState]:
    """The application on Ray, ready to answer; it ends with the block.

    Raises:
        UserError: It did not start, or the cluster that was joined has no room for it, or not what it needs.
    """
    port = config.port or free_port(config.host)
    # Nodes are asked for the model by the path at which replicas will open it.
    async with runtime.checked_ray_cluster(replace(config, model=resolve_checkpoint(config.model))):
        options = {"host": config.host, "port": port, "keep_alive_timeout_s": 75}
        await asyncio.to_thread(serve.start, http_options=options, logging_config=_logging(config))
        _keep_out_of_the_terminal(logging.getLogger("ray.serve"))
        try:
            await asyncio.to_thread(deploy, config, 1, agent_type)
            restore_signal_handlers()
            serving = ServerState(
                url=f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}",
                ray=ray.get_runtime_context().gcs_address,
                pid=os.getpid(),
                history=(resolve_checkpoint(config.model),),
            )
            write_atomic(Path(config.log_dir) / CONFIG_FILE, to_yaml(config).encode())
            serving.write(Path(config.log_dir))
            yield serving
        finally:
            (Path(config.log_dir) / STATE_FILE).unlink(missing_ok=True)
            await asyncio.to_thread(serve.shutdown)


def deploy(config: ServeConfig, version: int, agent_type: type[AgentReplica] = AgentReplica) -> None:
    """Deploys the application, or gives the one that runs other weights, `config.model`.

    Raises:
        UserError: It did not start.
    """
    app = build_application(
        config,
        gpus=runtime.use_gpus(config.ray),
        version=version,
        code_version=_code(config),
        agent_type=agent_type,
    )
    try:
        serve.run(app, name=APP_NAME, route_prefix="/", logging_config=_logging(config))
    except RuntimeError as error:
        raise UserError(
            f"the agent did not start: {str(error).splitlines()[-1]}; its log is in {config.log_dir}"
        ) from error


def _code(config: ServeConfig) -> str:
    """The same for all deployments of one server, whatever weights they have."""
    from blake3 import blake3

    return blake3(to_yaml(replace(config, model="")).encode()).hexdigest(length=8)


def _logging(config: ServeConfig) -> dict[str, Any]:
    folder = Path(config.log_dir).resolve()
    # What Ray Serve's controller and proxies write is theirs alone: objects of its own kind, without a run.
    encoding = config.monitoring.log_format.upper()
    return {"logs_dir": str(folder), "enable_access_log": False, "encoding": encoding}


def _keep_out_of_the_terminal(noise: logging.Logger) -> None:
    """What Ray Serve logs is in its files; here only what went wrong is shown."""
    for handler in noise.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])


def read_server_state(folder: Path) -> ServerState:
    """The server whose logs are in `folder`.

    Raises:
        UserError: None runs.
    """
    try:
        found = json.loads((folder / STATE_FILE).read_text())
        serving = ServerState(**{**found, "history": tuple(found["history"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no server runs with its logs in {folder}: start one with `vz-ray serve`") from error
    if not Path(f"/proc/{serving.pid}").exists():
        raise UserError(f"the server with its logs in {folder} has ended: start it with `vz-ray serve`")
    return serving


def run_roll(model: Path | None, folder: Path) -> None:
    """Gives a running server other weights: those of `model`, or None for those that it had before.

    Raises:
        UserError: No server runs, or its agents refuse the weights; they go on with theirs then.
    """
    asyncio.run(_roll(model, folder))


async def _roll(model: Path | None, folder: Path) -> None:
    serving = read_server_state(folder)
    if model is None and serving.version < 2:
        raise UserError("there is nothing to go back to: the server has its first weights")
    chosen = resolve_checkpoint(str(model) if model else serving.history[-2])
    config, version = load_config(ServeConfig, folder / CONFIG_FILE), serving.version + 1
    began = time.monotonic()
    async with runtime.ray_cluster(replace(config.ray, address=serving.ray)):
        await asyncio.to_thread(deploy, replace(config, model=chosen), version)
        state = await serve.get_deployment_handle(AGENT_DEPLOYMENT, APP_NAME).ready.remote()
        if state["version"] != version:
            # What Ray Serve holds a replica to that it starts later must be what the others have.
            await asyncio.to_thread(deploy, replace(config, model=serving.history[-1]), serving.version)
            raise UserError(f"{state['refused']}; version {serving.version} is still served")
    replace(serving, history=(*serving.history, chosen)).write(folder)
    print(f"version {version} is served: {chosen} ({time.monotonic() - began:.1f} s)")
