"""Node provider for Ray's autoscaler that starts nodes as local processes; used by `cluster.local`.

Ray's fake multi-node provider shares one directory between all nodes, so a new node overwrites the working
directory of a running job. This provider gives each node its own directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


class LocalNodeProvider(FakeMultiNodeProvider):
    """Fake multi-node provider with a temporary directory per node in `provider.temp_dir`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._temp_dir = Path(provider_config["temp_dir"])

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        with self.lock:
            id = self._next_hex_node_id()
            custom = dict(resources)
            params = RayParams(
                temp_dir=str(self._temp_dir / id[-3:]),
                gcs_address=self._gcs_address,
                redis_address=self._gcs_address,
                min_worker_port=0,
                max_worker_port=0,
                dashboard_agent_listen_port=0,
                num_cpus=custom.pop("CPU", 0),
                num_gpus=custom.pop("GPU", 0),
                object_store_memory=custom.pop("object_store_memory", None),
                resources=custom,
                labels=labels,
                env_vars={
                    # The autoscaler matches started nodes by these ids.
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": id,
                    "RAY_CLOUD_INSTANCE_ID": id,
                    "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
                    RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(custom),
                    LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
            self._nodes[id] = {
                "node": node,
                "tags": {
                    TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                    TAG_RAY_NODE_NAME: id,
                    TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
                    **tags,
                },
            }
