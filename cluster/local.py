"""Local Ray cluster of several nodes with Ray's real autoscaler, for rehearsals.

    python -m cluster.local up --nodes 3 --cpus 2 --jobs
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/tmp/vz_ray_cluster/token
    vz-ray submit conf/laptop.yaml runs=$PWD/runs data.train=$PWD/data/needle/train.json rollout.max_workers=3 \\
        --address http://127.0.0.1:8266
    python -m cluster.local down

Nodes are processes with logical resources. The head has room for a driver, a learner and decoders. The autoscaler
adds a worker node per rollout worker on demand, and removes idle nodes. Node groups match the manifests in k8s/: the
head is in `head`, `learner` and `clips`, worker nodes are in `rollout`. `--jobs` enables Ray's job API, which
requires a token. The cluster has its own temporary directory and ports.
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
        max_nodes: Maximum number of worker nodes.
        cpus: Logical CPUs of each worker node.
        head_cpus: Logical CPUs of the head.
        port: Port of the head.
        temp_dir: Temporary directory of all nodes. Its path must be short, because it contains sockets.
        idle_timeout_s: Idle time after which a worker node is removed.
        jobs_port: Port of the dashboard and job API; 0 disables them. With the API, Ray requires a token.
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
        """Token file for `RAY_AUTH_TOKEN_PATH`."""
        return self.temp_dir / "token"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that uses the cluster."""
        if not self.jobs_port:
            return {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def up(self) -> None:
        """Start the head; the autoscaler adds worker nodes on demand.

        Raises:
            UserError: The cluster is already running, or does not start.
        """
        if self.processes():
            raise UserError(f"a cluster in {self.temp_dir} is already running: `python -m cluster.local down`")
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
                # The agent starts jobs; another Ray on this machine may use the default port.
                f"--dashboard-agent-listen-port={self.jobs_port + 1}",
            ]
            self.token_file.touch(mode=0o600)
            self.token_file.write_text(secrets.token_urlsafe(32))
        else:
            command += ["--include-dashboard=false"]
        env = {
            **self.environment(),
            "RAY_FAKE_CLUSTER": "1",
            # Kubernetes uses version 2; it identifies the head by this id.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # Jobs run `python` from PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
        if done.returncode:
            self.down()
            raise UserError(f"the head did not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}")

    def down(self) -> None:
        """Terminate all processes of the cluster."""
        processes = self.processes()
        for process in processes:
            _suppress_ended(process.terminate)
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            _suppress_ended(process.kill)
        psutil.wait_procs(alive, timeout=5)

    def processes(self) -> list[psutil.Process]:
        """Return the processes whose command line contains the temporary directory, and their children."""
        roots = [p for p in psutil.process_iter() if p.pid != os.getpid() and str(self.temp_dir) in _command(p)]
        by_pid = {process.pid: process for root in roots for process in (root, *_children(root))}
        return [process for pid, process in by_pid.items() if pid != os.getpid()]

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
                # All nodes have the same address.
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


def _suppress_ended(action: Any) -> None:
    try:
        action()
    except psutil.Error:
        return  # the process has already ended


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def up(
    nodes: Annotated[int, typer.Option(help="Maximum number of worker nodes.")] = 3,
    cpus: Annotated[float, typer.Option(help="Logical CPUs of each worker node.")] = 2,
    port: Annotated[int, typer.Option(help="Port of the head.")] = PORT,
    jobs: Annotated[bool, typer.Option("--jobs", help=f"With Ray's job API, at port {JOBS_PORT}.")] = False,
) -> None:
    """Start the cluster."""
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
            f"jobs: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token_file}; "
            f"vz-ray submit ... --address {cluster.jobs_address}"
        )


@app.command()
def down() -> None:
    """Stop the cluster."""
    LocalCluster().down()


if __name__ == "__main__":
    app()
