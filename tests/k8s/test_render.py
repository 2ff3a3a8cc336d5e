"""Manifests from a config: names, sizes from the plan, times to stop, bad input."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from vz_ray.config.load import load_config
from vz_ray.config.site import SiteConfig
from vz_ray.k8s.manifest import Manifest, Workload, parse_quantity, read_manifests, workload_of
from vz_ray.k8s.pod_spec import SPOT_LABELS
from vz_ray.k8s.render import render, to_yaml
from vz_ray.k8s.rules import find_problems
from vz_ray.k8s.run_spec import RenderRequest
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.planner import load_plannable_config
from vz_ray.planning.timeouts import plan_stop
from vz_ray.utils.errors import UserError

DATA = ["data.train=/videos/t.json", "data.validation=/videos/v.json", "clips.disk_cache_gib=100"]
DATA += ["clips.download_cache_gib=50", "model=/models/Qwen2.5-VL-7B-Instruct"]
SFT = ["conf/videozoomer-7b-sft.yaml", *DATA[2:], "data=/videos/sft.json"]
SPLIT = ["conf/videozoomer-7b-rl-split.yaml", *DATA]
SHARED = ["conf/videozoomer-7b-rl.yaml", *DATA]
SERVE = ["serve", "conf/serve/7b.yaml", *DATA[2:]]


@cache
def render_once(arguments: tuple[str, ...], **options: object) -> list[Manifest]:
    return render_checked(arguments, SiteConfig(), options)


def render_checked(arguments: Sequence[str], site: SiteConfig, options: dict[str, object]) -> list[Manifest]:
    request = RenderRequest(arguments, **{"name": "alice-1", **options})  # type: ignore[arg-type]
    manifests = render(request, site)
    assert find_problems(manifests) == []
    return manifests


def rendered(arguments: list[str], site: SiteConfig | None = None, **options: object) -> list[Manifest]:
    return render_once(tuple(arguments), **options) if site is None else render_checked(arguments, site, options)


def workload(arguments: list[str], site: SiteConfig | None = None, **options: object) -> Workload:
    return workload_of(rendered(arguments, site, **options))


def sizes(job: Workload) -> dict[str, tuple[int, int, float, float]]:
    """Minimum and maximum pods, CPUs and GPUs of each group."""
    return {
        g.name: (g.spec["minReplicas"], g.max_replicas, g.resources["CPU"], g.resources["GPU"]) for g in job.groups[1:]
    }


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (SHARED, {"gpus": 16}, {"learner": (2, 2, 64, 8), "clips": (1, 1, 8, 0)}),
        (SHARED, {"gpus": 12}, {"learner": (2, 2, 48, 6), "clips": (1, 1, 8, 0)}),
        (SPLIT, {"gpus": 10}, {"learner": (1, 1, 64, 8), "rollout": (2, 2, 8, 1), "clips": (1, 1, 8, 0)}),
        (
            SPLIT,
            {"gpus": 24, "spot": True},
            {"learner": (1, 1, 64, 8), "rollout": (0, 16, 8, 1), "clips": (1, 1, 8, 0)},
        ),
        (SFT, {}, {"learner": (1, 1, 64, 8), "clips": (1, 1, 4, 0)}),
        (SFT, {"kind": "cluster"}, {"learner": (1, 1, 64, 8), "clips": (1, 1, 4, 0)}),
        (SERVE, {"kind": "service", "gpus": 3}, {"serve": (1, 3, 8, 1)}),
        (
            [*SPLIT, "clips.num_actors=12", "clips.max_actors=60", "clips.cpus_per_actor=1"],
            {},
            {"learner": (1, 1, 64, 8), "rollout": (8, 8, 8, 1), "clips": (1, 4, 16, 0)},
        ),
    ],
    ids=["shared", "uneven", "split", "spot", "sft", "cluster", "service", "elastic-clips"],
)
def test_groups_follow_config_and_gpus(arguments, options, expected):
    job = workload(arguments, **options)
    assert sizes(job) == expected
    elastic = any(small < large for small, large, _, _ in expected.values())
    assert bool(job.cluster.get("enableInTreeAutoscaling")) == elastic


def test_two_runs_share_no_object_and_select_their_own_pods():
    first, second = (rendered(SFT, name=name) for name in ("alice-1", "bob-1"))
    names = [{(m["kind"], m["metadata"]["name"]) for m in run} for run in (first, second)]
    assert not names[0] & names[1]
    for run in (first, second):
        labels = {group.name: group.labels for group in workload_of(run).groups}
        for budget in (m for m in run if m["kind"] == "PodDisruptionBudget"):
            selected = budget["spec"]["selector"]["matchLabels"]
            assert selected == labels[selected["vz-ray/group"]]
    directories = [w for w in shlex.split(workload_of(first).spec["entrypoint"]) if w.startswith(("name=", "runs="))]
    assert sorted(directories) == ["name=alice-1", "runs=/runs"]


def test_grace_periods_follow_the_plan_and_the_storage():
    config = load_plannable_config(SHARED[0], SHARED[1:])
    for gbps in (0.2, 2.0):
        seconds, _ = plan_stop(config, Assumptions(storage_gbps=gbps))
        job = workload(SHARED, SiteConfig(storage_gbps=gbps), gpus=16)
        groups = {group.name: group for group in job.groups}
        wait_s = float(groups["head"].env["RAY_JOB_STOP_WAIT_TIME_S"]["value"])
        assert max(120, seconds) <= wait_s <= max(120, seconds) + 1
        for name, hook in (("head", "stop-jobs"), ("learner", "wait-idle")):
            hook_s = groups[name].hook_seconds(hook)
            assert wait_s < hook_s < groups[name].pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("notice_s", "hook_s"), [(120, 90), (30, 20)])
def test_spot_pods_drain_within_the_notice(notice_s, hook_s):
    job = workload(SPLIT, SiteConfig(spot_notice_s=notice_s), gpus=12, spot=True)
    (rollout,) = (group for group in job.groups if group.name == "rollout")
    assert (rollout.hook_seconds("vz-ray drain"), rollout.pod["terminationGracePeriodSeconds"]) == (hook_s, notice_s)


@pytest.mark.parametrize("required", [True, False])
def test_spot_pods_ask_for_spot_nodes_of_each_cloud(required):
    job = workload(SPLIT, SiteConfig(spot_required=required), gpus=12, spot=True)
    groups = {group.name: group for group in job.groups}
    affinity = groups["rollout"].pod["affinity"]["nodeAffinity"]
    if required:
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    else:
        terms = [item["preference"] for item in affinity["preferredDuringSchedulingIgnoredDuringExecution"]]
    asked = {(e["key"], e["values"][0]) for term in terms for e in term["matchExpressions"] if e["operator"] == "In"}
    assert asked == set(SPOT_LABELS)
    assert groups["rollout"].is_spot
    assert not groups["learner"].is_spot
    (avoided,) = groups["learner"].pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {e["operator"] for e in avoided["matchExpressions"]} == {"NotIn"}


@pytest.mark.parametrize(
    ("arguments", "options", "elastic"),
    [(SFT, {}, False), (SFT, {"kind": "cluster"}, False), (SERVE, {"kind": "service"}, True)],
    ids=["job", "cluster", "service"],
)
def test_queue_reaches_every_kind(arguments, options, elastic):
    metadata = workload(arguments, queue="q", **options).manifest["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert (metadata["annotations"].get("kueue.x-k8s.io/elastic-job") == "true") == elastic


def test_memory_covers_states_engines_and_shared_memory():
    job = workload(SHARED, gpus=16)
    (learner,) = (group for group in job.groups if group.name == "learner")
    volumes = {volume["name"]: volume for volume in learner.pod["volumes"]}
    shm = parse_quantity(volumes["shared-memory"]["emptyDir"]["sizeLimit"])
    # Two versions of 16.6 GB, beside Ray's objects.
    assert shm >= 2 * 16.58e9 + float(learner.spec["rayStartParams"]["object-store-memory"])
    assert learner.limits["memory"] >= 8 * 47.9 * 2**30 + shm


def test_decoders_share_the_pods_if_there_are_no_cpu_nodes():
    site = SiteConfig()
    site.cpu_node.cpus = 0
    with pytest.raises(UserError, match=r"learner needs memory_gib .* gpu_node.memory_gib is 960: use more GPUs"):
        workload(["conf/videozoomer-7b-rl-8gpu.yaml", *DATA], site)
    site.gpu_node.memory_gib = 1300
    job = workload(["conf/videozoomer-7b-rl-8gpu.yaml", *DATA], site)
    assert sizes(job) == {"learner": (1, 1, 64, 8)}
    assert "clips.node_group=learner" in job.spec["entrypoint"]


def test_config_outside_the_image_becomes_a_config_map(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {Path('conf/videozoomer-7b-sft.yaml').resolve()}\nsft: {{max_steps: 7}}\n")
    manifests = rendered([str(own), *SFT[1:]])
    assert manifests[0]["kind"] == "ConfigMap"
    assert "max_steps: 7" in manifests[0]["data"]["config.yaml"]
    assert "/etc/vz-ray/config.yaml" in workload_of(manifests).spec["entrypoint"]


def test_scratch_may_be_a_generic_ephemeral_volume():
    job = workload([*SFT, "clips.disk_cache_gib=900"], SiteConfig(scratch_class="fast"))
    (clips,) = (group for group in job.groups if group.name == "clips")
    (scratch,) = (volume for volume in clips.pod["volumes"] if volume["name"] == "scratch")
    spec = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (spec["storageClassName"], spec["resources"]["requests"]["storage"]) == ("fast", "1000Gi")
    assert clips.limits["ephemeral-storage"] < 100 * 2**30


def test_yaml_round_trip_and_comment(tmp_path: Path):
    manifests = rendered(SPLIT, gpus=10)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(manifests, "first\nsecond"))
    assert path.read_text().startswith("# first\n# second\napiVersion")
    assert read_manifests(path) == manifests


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (SFT, {"name": "Alice_1"}, "--name is 'Alice_1'; Kubernetes needs lower-case"),
        (SFT, {"name": "a" * 48}, "at most 47 characters"),
        (SFT, {"kind": "pod"}, "--kind is 'pod'; it must be one of job, cluster, service"),
        (SFT, {"spot": True}, "SFT has no rollout workers"),
        (SHARED, {"spot": True}, "use conf/videozoomer-7b-rl-split.yaml"),
        (SERVE, {}, "--kind is job and the command is serve"),
        (SPLIT, {"gpus": 8}, r"--gpus is 8; .*learner.world_size.* Use at least 9"),
        ([*SFT, "name=x"], {}, "--name sets it, remove name="),
        (
            [*SHARED, "data.train=data/t.json"],
            {},
            "data.train is 'data/t.json', which no pod mounts; give a path below",
        ),
        ([*SFT, "model=/elsewhere/Qwen2.5-VL-7B"], {}, "model is '/elsewhere/Qwen2.5-VL-7B', which no pod mounts"),
        ([*SFT, "model=/models/mine"], {}, "--shape Qwen2.5-VL-7B"),
        (["ablate", "conf/ablation.yaml"], {}, "'ablate' cannot be rendered; use one of train"),
        ([], {}, "got 0 config files"),
    ],
)
def test_bad_requests_get_one_line(arguments, options, message):
    with pytest.raises(UserError, match=message) as error:
        rendered(arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (["gpu_node.memory_gib=200"], SFT, "a pod of the group learner needs memory_gib .* gpu_node.memory_gib is 200"),
        (["gpu_node.cpus=16"], [*SFT, "learner.cpus_per_rank=4"], "learner needs cpus 32, and gpu_node.cpus is 16"),
        (["cpu_node.disk_gib=100"], SFT, "clips needs disk_gib .* lower clips.disk_cache_gib"),
        (["gpu_node.gpus=1"], [*SPLIT, "rollout.engine.tensor_parallel_size=2"], "rollout needs gpus 2, .* is 1"),
        (["gpu_node.gpu=L4"], SFT, "GiB more memory than a L4 has; `vz-ray plan`"),
        (["gpu_node.gpus=0"], SFT, "ray.use_gpus is always, and the site has no GPUs"),
    ],
)
def test_run_that_fits_no_node_is_refused(overrides, arguments, message):
    with pytest.raises(UserError, match=message):
        rendered(arguments, load_config(SiteConfig, None, overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scratch_clas: fast", "site.yaml:1: unknown key scratch_clas; did you mean scratch_class"),
        ("claims: {run: x}", "unknown key claims.run; did you mean claims.runs"),
        ("image: vz-ray", "image is 'vz-ray'; it must have a tag"),
        ("gpu_node: {cpus: 0}", "gpu_node.gpus is 8 and cpus is 0"),
        ("cpu_node: {memory_gib: 0}", "cpu_node.memory_gib is 0; a node with CPUs has some"),
        ("claims: {runs: ''}", "claims.runs is empty"),
    ],
)
def test_site_errors_name_file_and_key(tmp_path: Path, text, message):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(SiteConfig, tmp_path / "site.yaml")
