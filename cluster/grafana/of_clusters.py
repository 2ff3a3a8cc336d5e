"""Panels about what is not a run: served agents, and Ray's own nodes."""

from __future__ import annotations

from cluster.grafana.panel import WINDOW, plain, served

SERVING = (
    plain(
        "Requests",
        "reqps",
        "By how they ended; `shed` are refused as too many.",
        ("{{outcome}}", f"sum by (outcome) (rate(vz_ray_requests_total[{WINDOW}]))"),
    ),
    plain(
        "Under way",
        "short",
        "Requests that are being answered.",
        ("requests", "sum(vz_ray_requests_in_progress)"),
    ),
    plain(
        "Whole requests",
        "s",
        "From the request's body to the end of the reply.",
        ("median", served(0.5, "vz_ray_request_duration_seconds")),
        ("p95", served(0.95, "vz_ray_request_duration_seconds")),
    ),
    plain(
        "First text",
        "s",
        "Until the first text of a stream.",
        ("median", served(0.5, "vz_ray_time_to_first_token_seconds")),
        ("p95", served(0.95, "vz_ray_time_to_first_token_seconds")),
    ),
    plain(
        "First clip",
        "s",
        "Until the first clip of a stream.",
        ("median", served(0.5, "vz_ray_time_to_first_zoom_seconds")),
        ("p95", served(0.95, "vz_ray_time_to_first_zoom_seconds")),
    ),
    plain(
        "Tokens",
        "short",
        "Read and said, a second.",
        ("{{kind}}", f"sum by (kind) (rate(vz_ray_tokens_total[{WINDOW}]))"),
    ),
    plain(
        "Frames",
        "short",
        "Shown to the model, a second.",
        ("frames", f"sum(rate(vz_ray_frames_total[{WINDOW}]))"),
    ),
    plain(
        "Zooms",
        "short",
        "Carried out, and answers that the gate gave at once, a second.",
        ("zooms", f"sum(rate(vz_ray_zooms_total[{WINDOW}]))"),
        ("gated", f"sum(rate(vz_ray_zoom_gate_skips_total[{WINDOW}]))"),
    ),
    plain(
        "Weights",
        "short",
        "Version that answered last, newest and oldest of the servers.",
        ("newest", "max(vz_ray_weight_version)"),
        ("oldest", "min(vz_ray_weight_version)"),
    ),
)

NODES = (
    plain(
        "Processors",
        "percent",
        "Use of each node's processors.",
        ("{{instance}}", "max by (instance) (ray_node_cpu_utilization)"),
    ),
    plain(
        "Memory",
        "bytes",
        "Used on each node.",
        ("{{instance}}", "max by (instance) (ray_node_mem_used)"),
        ("{{instance}} of", "max by (instance) (ray_node_mem_total)"),
    ),
    plain(
        "Object store",
        "bytes",
        "Memory of Ray's object store, by node.",
        ("{{instance}} used", "max by (instance) (ray_object_store_used_memory)"),
        ("{{instance}} free", "max by (instance) (ray_object_store_available_memory)"),
    ),
    plain(
        "Disk",
        "bytes",
        "Used on each node.",
        ("{{instance}}", "max by (instance) (ray_node_disk_usage)"),
        ("{{instance}} free", "max by (instance) (ray_node_disk_free)"),
    ),
    plain(
        "Network",
        "Bps",
        "Received and sent by each node.",
        ("{{instance}} in", "max by (instance) (ray_node_network_receive_speed)"),
        ("{{instance}} out", "max by (instance) (ray_node_network_send_speed)"),
    ),
    plain(
        "Actors",
        "short",
        "By state, as the head node counts them.",
        ("{{State}}", "sum by (State) (ray_actors)"),
    ),
    plain(
        "Logical resources",
        "short",
        "CPUs and GPUs of the cluster, used and free.",
        ("{{Name}} {{State}}", 'sum by (Name, State) (ray_resources{Name=~"CPU|GPU"})'),
    ),
    plain(
        "Not to be scheduled",
        "short",
        "Kinds of work that no node can ever take.",
        ("kinds", "sum(ray_internal_num_infeasible_scheduling_classes)"),
    ),
    plain(
        "Spilled objects",
        "bytes",
        "Bytes that the object store wrote to disk: nothing of ours should.",
        ("{{instance}} {{State}}", "sum by (instance, State) (ray_spill_manager_objects_bytes)"),
    ),
)
