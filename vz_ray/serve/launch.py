"""Start a server (`vz-ray serve`) and change its weights (`vz-ray roll`).

serve: starts Ray and Ray Serve on this machine until Ctrl-C. Writes its address to `server.json`.
roll:  joins that Ray cluster and redeploys the application with other weights; replicas swap them in place.
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
from vz_ray.rollout.engine_args import check_engine_options
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.serve.access_control import is_loopback
from vz_ray.serve.api_keys import ApiKeyStore
from vz_ray.serve.app import AGENT_DEPLOYMENT, APP_NAME, AgentReplica, build_application
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, restore_signal_handlers
from vz_ray.utils.ports import find_free_port
from vz_ray.utils.timeouts import with_timeout

STATE_FILE, CONFIG_FILE = "server.json", "config.yaml"
STARTUP_INTERRUPTED_HINT = "the server was still starting and has no state; run the same command again"


@dataclass(frozen=True, slots=True)
class ServerState:
    """State of a running server, stored as `server.json` in its log directory.

    Attributes:
        url: Address of the server.
        ray: Address of its Ray cluster.
        pid: Process that started the server.
        checkpoints: Checkpoint of each weight version; the first is version 1.
    """

    url: str
    ray: str
    pid: int
    checkpoints: tuple[str, ...]

    @property
    def version(self) -> int:
        return len(self.checkpoints)

    def write(self, folder: Path) -> None:
        write_atomic(folder / STATE_FILE, json.dumps(asdict(self), indent=1).encode())


def run_serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C.

    Raises:
        UserError: The model is missing, the port is in use, or a public host has no API keys.
    """
    check_config(config)
    asyncio.run(_serve(config))


def check_config(config: ServeConfig) -> None:
    """Check model, keys and port before anything starts.

    Raises:
        UserError: See `run_serve`.
    """
    resolve_checkpoint(config.model)
    check_engine_options(config.engine)
    keys = ApiKeyStore.from_config(config.access.keys_file, config.access.keys_env, os.environ)
    if keys is None and not is_loopback(config.host):
        raise UserError(
            f"host is {config.host}, which other machines can reach; this requires API keys. Create one with "
            "`vz-ray keys create NAME --file keys.json` and set access.keys_file=keys.json, or set "
            "host=127.0.0.1"
        )
    with _open_socket(config.host) as server_socket:
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server_socket.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}); set another port=..., or "
                "port=0 for a free one"
            ) from error


def resolve_checkpoint(model: str) -> str:
    """Return the absolute path of a checkpoint directory.

    Raises:
        UserError: The directory contains no safetensors files.
    """
    if not model or not list(Path(model).glob("*.safetensors")):
        raise UserError(f"model is {model!r}, which is not a checkpoint directory; set model=PATH")
    return os.path.abspath(model)


async def _serve(config: ServeConfig) -> None:
    folder = Path(config.log_dir)
    logging_config.configure_logging(folder, identity=runtime.run_identity(config))
    console = Console(highlight=False)
    with Interrupt(resume_hint=STARTUP_INTERRUPTED_HINT) as interrupt:
        async with AsyncExitStack() as stack:
            with console.status(f"starting an engine for {config.model} (logs: {folder}) ..."):
                server = await interrupt.run_interruptible(stack.enter_async_context(running_server(config)))
            console.print(f"[bold]{config.name}[/] is serving at [bold]{server.url}[/]  (web page, and /v1)")
            console.print(f"  model   {config.model}")
            console.print(f"  logs    {folder}")
            console.print(f"  curl {server.url}/v1/models     stop with Ctrl-C")
            await interrupt.wait_requested()
            console.print("stopping after the running requests ...")


@asynccontextmanager
async def running_server(
    config: ServeConfig, agent_type: type[AgentReplica] = AgentReplica
) -> AsyncIterator[ServerState]:
    """Start Ray Serve and the application; yield when it is ready, shut down at exit.

    Raises:
        UserError: The application did not start, or the cluster lacks the required resources.
    """
    port = config.port or find_free_port(config.host)
    # The preflight check of the nodes needs the path that the replicas will open.
    async with ray_cluster.checked_ray_cluster(replace(config, model=resolve_checkpoint(config.model))):
        options = {"host": config.host, "port": port, "keep_alive_timeout_s": 75}
        await asyncio.to_thread(serve.start, http_options=options, logging_config=_serve_logging(config))
        _show_errors_only(logging.getLogger("ray.serve"))
        log_dir = Path(config.log_dir)
        try:
            await asyncio.to_thread(deploy, config, 1, agent_type)
            restore_signal_handlers()
            server = ServerState(
                url=f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}",
                ray=ray.get_runtime_context().gcs_address,
                pid=os.getpid(),
                checkpoints=(resolve_checkpoint(config.model),),
            )
            write_atomic(log_dir / CONFIG_FILE, to_yaml(config).encode())
            server.write(log_dir)
            yield server
        finally:
            (log_dir / STATE_FILE).unlink(missing_ok=True)
            await asyncio.to_thread(serve.shutdown)


def deploy(config: ServeConfig, version: int, agent_type: type[AgentReplica] = AgentReplica) -> None:
    """Deploy the application, or update the weights of the running one to `config.model`.

    Raises:
        UserError: The application did not start.
    """
    app = build_application(
        config,
        gpus=ray_cluster.use_gpus(config.ray),
        version=version,
        code_version=_code_version(config),
        agent_type=agent_type,
    )
    try:
        serve.run(app, name=APP_NAME, route_prefix="/", logging_config=_serve_logging(config))
    except RuntimeError as error:
        raise UserError(
            f"the agent did not start: {str(error).splitlines()[-1]}; see its log in {config.log_dir}"
        ) from error


def _code_version(config: ServeConfig) -> str:
    """Return a hash that is equal for all deployments of one server, whatever their weights."""
    from blake3 import blake3

    return blake3(to_yaml(replace(config, model="")).encode()).hexdigest(length=8)


def _serve_logging(config: ServeConfig) -> dict[str, Any]:
    """Return Ray Serve's logging configuration, for its controller and proxies."""
    folder = Path(config.log_dir).resolve()
    encoding = config.monitoring.log_format.upper()
    return {"logs_dir": str(folder), "enable_access_log": False, "encoding": encoding}


def _show_errors_only(logger: logging.Logger) -> None:
    """Limit the terminal output of Ray Serve to errors; its log files contain everything."""
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)


def _open_socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def read_server_state(folder: Path) -> ServerState:
    """Return the state of the running server with the log directory `folder`.

    Raises:
        UserError: No server with this log directory is running.
    """
    try:
        fields = json.loads((folder / STATE_FILE).read_text())
        server = ServerState(**{**fields, "checkpoints": tuple(fields["checkpoints"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no running server has the log directory {folder}; start one with `vz-ray serve`") from error
    if not Path(f"/proc/{server.pid}").exists():
        raise UserError(f"the server with the log directory {folder} has stopped; start one with `vz-ray serve`")
    return server


def run_roll(model: Path | None, folder: Path) -> None:
    """Change the weights of a running server to `model`; None restores the previous weights.

    Raises:
        UserError: The server is not running, or its replicas refuse the weights and keep the current ones.
    """
    asyncio.run(_roll(model, folder))


async def _roll(model: Path | None, folder: Path) -> None:
    server = read_server_state(folder)
    if model is None and server.version < 2:
        raise UserError("there are no previous weights: the server still has its first version")
    checkpoint = resolve_checkpoint(str(model) if model else server.checkpoints[-2])
    config, version = load_config(ServeConfig, folder / CONFIG_FILE), server.version + 1
    started = time.monotonic()
    async with ray_cluster.ray_cluster(replace(config.ray, address=server.ray)):
        await asyncio.to_thread(deploy, replace(config, model=checkpoint), version)
        state = await with_timeout(
            serve.get_deployment_handle(AGENT_DEPLOYMENT, APP_NAME).ready.remote(),
            config.timeouts.engine_start_s,
            target="agent",
            operation=f"reporting weight version {version}",
        )
        if state["version"] != version:
            # New replicas must start with the weights of the running ones.
            await asyncio.to_thread(deploy, replace(config, model=server.checkpoints[-1]), server.version)
            raise UserError(f"{state['swap_error']}; version {server.version} is still being served")
    replace(server, checkpoints=(*server.checkpoints, checkpoint)).write(folder)
    print(f"serving version {version}: {checkpoint} ({time.monotonic() - started:.1f} s)")
