"""A cluster of several nodes on this machine, with Ray's real autoscaler, to rehearse on.

    python -m cluster.local up --nodes 3 --cpus 2 --jobs
    export RAY_AUTH_TOKEN_PATH=/tmp/vz_ray_cluster/token
    vz-ray submit conf/tiny.yaml runs=$PWD/runs rollout.max_workers=3 --address http://127.0.0.1:8266
    python -m cluster.local down

Nodes are processes with resources that are only counted: the head has room for a driver, a learner and
decoders, and worker nodes come when something waits for their resource, one rollout worker each, and go when
idle. They belong to the groups that the manifests of a real cluster have: the head to `head`, `learner` and
`clips`, the others to `rollout`. With `--jobs` it has Ray's job API, which wants a token. It has a temporary
directory and ports of its own, and ends only what it started.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from vz_ray.utils.errors import UserError

PORT = 6399
JOBS_PORT = 8266
HEAD_NODE_TYPE, WORKER_NODE_TYPE = "ray.head.default", "worker"
HEAD_NODE_GROUPS = ("head", "learner", "clips")
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A head and up to `max_nodes` worker nodes.

    Attributes:
        max_nodes: Most worker nodes.
        cpus: Logical CPUs of each.
        head_cpus: Logical CPUs of the head.
        port: Of the head's address.
        temp_dir: Temporary directory of all nodes; its path must be short, since sockets lie in it.
        idle_timeout_s: A worker node that nobody used for as long goes.
        jobs_port: Of the dashboard and job API; 0 has none. Where there is one, everything wants a token.
    """

    max_nodes: int = 3
    cpus: float = 2
    head_cpus: float = 6
    port: int = PORT
    temp_dir: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "vz_ray_cluster")
    idle_timeout_s: float = 20.0
    jobs_port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def jobs_address(self) -> str:
        """Address of the job API."""
        return f"http://127.0.0.1:{self.jobs_port}"

    @property
    def token_file(self) -> Path:
        """File with the token, for `RAY_AUTH_TOKEN_PATH`."""
        return self.temp_dir / "token_file"

    def environment(self) -> dict[str, str]:
        """Of a process that uses it."""
        if not self.jobs_port:
            return {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        return {**os.environ, "RAY_AUTH_MODE": "token_file", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def up(self) -> None:
        """Starts the head; worker nodes come when something needs them.

        Raises:
            UserError: It runs already, or does not start.
        """
        if self.processes():
            raise UserError(
                f"a cluster with files in {self.temp_dir} runs already: `python -m cluster.local down`"
            )
        self.temp_dir.mkdir(parents=True, exist_ok=True)
        config = self.temp_dir / "autoscaler.json"
        config.write_text(json.dumps(self._autoscaler()))
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={self.port}",
            f"--temp-dir={self.temp_dir}",
            f"--autoscaling-config={config}",
            f"--num-cpus={self.head_cpus:g}",
            "--object-store-memory=268435456",
            f"--resources={json.dumps(dict.fromkeys(HEAD_NODE_GROUPS, 1))}",
            "--disable-usage-stats",
        ]
        if self.jobs_port:
            command += [
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.jobs_port}",
                # It starts the jobs; another Ray on this machine has the usual port.
                f"--dashboard-agent-listen-port={self.jobs_port + 1}",
            ]
            self.token_file.touch(mode=0o600)
            self.token_file.write_text(secrets.token_urlsafe(32))
        else:
            command += ["--include-dashboard=false"]
        env = {
            **self.environment(),
            "RAY_FAKE_CLUSTER": "1",
            # Version 2 is what runs on Kubernetes; it asks the provider for the head by this id.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # Jobs run `python`, which must be this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
        if done.returncode:
            self.down()
            raise UserError(
                f"the head did not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
            )

    def down(self) -> None:
        """Ends every process of it."""
        found = self.processes()
        for process in found:
            _quietly(process.terminate)
        _, alive = psutil.wait_procs(found, timeout=5)
        for process in alive:
            _quietly(process.kill)
        psutil.wait_procs(alive, timeout=5)

    def processes(self) -> list[psutil.Process]:
        """Those whose command lines name its folder, and all that they have started."""
        roots = [
            p for p in psutil.process_iter() if p.pid != os.getpid() and str(self.temp_dir) in _command(p)
        ]
        found = {process.pid: process for root in roots for process in (root, *_children(root))}
        return [process for pid, process in found.items() if pid != os.getpid()]

    def _autoscaler(self) -> dict[str, Any]:
        resources: dict[str, float] = {"CPU": self.cpus, "object_store_memory": 128 * 2**20, "rollout": 1}
        head: dict[str, float] = {"CPU": self.head_cpus, **dict.fromkeys(HEAD_NODE_GROUPS, 1)}
        return {
            "cluster_name": "local",
            "max_workers": self.max_nodes,
            "upscaling_speed": 20,
            "idle_timeout_minutes": self.idle_timeout_s / 60,
            "provider": {
                "type": "external",
                "module": "cluster.local_node_provider.LocalNodeProvider",
                "temp_dir": str(self.temp_dir),
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "gcs_address": self.address,
                # All nodes have one address here.
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": HEAD_NODE_TYPE,
            "available_node_types": {
                HEAD_NODE_TYPE: {"resources": head, "node_config": {}, "max_workers": 0},
                WORKER_NODE_TYPE: {
                    "resources": resources,
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self.max_nodes,
                },
            },
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "initialization_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _quietly(action: Any) -> None:
    try:
        action()
    except psutil.Error:
        return  # it has ended by itself


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def up(
    nodes: Annotated[int, typer.Option(help="Most worker nodes.")] = 3,
    cpus: Annotated[float, typer.Option(help="Logical CPUs of each.")] = 2,
    port: Annotated[int, typer.Option(help="Port of the head.")] = PORT,
    jobs: Annotated[bool, typer.Option("--jobs", help=f"With Ray's job API, at port {JOBS_PORT}.")] = False,
) -> None:
    """Starts it."""
    cluster = LocalCluster(max_nodes=nodes, cpus=cpus, port=port, jobs_port=JOBS_PORT if jobs else 0)
    began = time.monotonic()
    try:
        cluster.up()
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"up after {time.monotonic() - began:.0f} s; use it with ray.address={cluster.address}")
    if jobs:
        print(
            f"jobs: export RAY_AUTH_TOKEN_PATH={cluster.token_file}; vz-ray submit ... --address {cluster.jobs_address}"
        )


@app.command()
def down() -> None:
    """Ends it, and nothing else."""
    LocalCluster().down()


if __name__ == "__main__":
    app()
