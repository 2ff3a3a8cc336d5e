"""Groups, versions, autoscaling, the token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from cluster.manifests.objects import GPU, NODE_GROUPS, Bundle
from cluster.manifests.rules.registry import rule
from cluster.manifests.schema import ROOT

SPOT_TAINTS = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "vz-ray/spot",
)
"""Taints that keep pods off machines that may be taken away: those of clouds, and one to set by hand."""


@cache
def locked_ray() -> str:
    """The version of Ray in requirements/cpu.lock."""
    found = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    return found[1] if found else ""


@rule
def head_takes_no_work(bundle: Bundle) -> Iterator[str]:
    """The head has no CPUs and GPUs to give, so that nothing starves what keeps the cluster together."""
    for head in (workload.head for workload in bundle.workloads):
        for name in ("CPU", "GPU"):
            if amount := head.resources[name]:
                yield (
                    f'{head.label}: Ray is told of {amount:g} {name}; set it to "0" in '
                    "headGroupSpec.resources"
                )
        if head.amount("limits", GPU) or head.amount("requests", GPU):
            yield f"{head.label}: it asks for {GPU}; remove that, the head computes nothing"


@rule
def replicas_are_in_order(bundle: Bundle) -> Iterator[str]:
    """minReplicas <= replicas <= maxReplicas, and somebody may come."""
    for group in bundle.groups:
        fewest, wanted, most = group.replicas()
        if not fewest <= wanted <= most or most < 1:
            yield (
                f"{group.label}: minReplicas, replicas, maxReplicas are {fewest}, {wanted}, {most}; "
                "they must rise, to at least 1"
            )


@rule
def learner_is_fixed(bundle: Bundle) -> Iterator[str]:
    """The learner's group has one size: ranks wait for each other, and a part would hold GPUs."""
    for group in bundle.groups:
        if group.name == "learner" and len(set(group.replicas())) > 1:
            yield f"{group.label}: minReplicas, replicas, maxReplicas are {group.replicas()}; make them equal"


@rule
def versions_agree(bundle: Bundle) -> Iterator[str]:
    """One image in a cluster, whose tag names the locked Ray, as rayVersion does."""
    for workload in bundle.workloads:
        said = str(workload.cluster.get("rayVersion"))
        if said != locked_ray():
            yield (
                f"{workload.label}: rayVersion is {said}, and requirements/cpu.lock has {locked_ray()}; set "
                "that"
            )
        images = {str(c.get("image")): pod.label for pod in workload.pods for c in pod.containers}
        if len(images) > 1:
            yield (
                f"{workload.label}: it has the images {', '.join(sorted(images))}; nodes must have the same "
                "code"
            )
        for image, where in images.items():
            tag = image.rpartition("/")[2].partition(":")[2]
            found = re.search(r"(?:^|-)ray(\d+\.\d+\.\d+)(?:-|$)", tag)
            if not found or found[1] != locked_ray():
                yield (
                    f"{where}: the image is {image}; its tag must name the Ray in it, -ray{locked_ray()}-, "
                    "as those of cluster/docker do"
                )


@rule
def autoscaler_is_the_second(bundle: Bundle) -> Iterator[str]:
    """Where KubeRay's autoscaling is on, it is version 2: it drains nodes before it takes them."""
    for workload in bundle.workloads:
        version = (workload.cluster.get("autoscalerOptions") or {}).get("version")
        if workload.cluster.get("enableInTreeAutoscaling"):
            if version != "v2":
                yield f"{workload.label}: autoscalerOptions.version is {version}; set v2"
        elif any(group.replicas()[0] != group.replicas()[2] for group in workload.workers):
            yield (
                f"{workload.label}: groups may grow and enableInTreeAutoscaling is off, so none would; "
                "turn it on, or make maxReplicas equal to minReplicas"
            )
        for group in workload.workers:
            if "idleTimeoutSeconds" in group.group_spec and version != "v2":
                yield (
                    f"{group.label}: idleTimeoutSeconds is set without autoscaler v2, which KubeRay refuses; "
                    "remove it"
                )
        for group in workload.groups:
            if (
                "RAY_enable_autoscaler_v2" in group.env()
                or group.spec.get("restartPolicy", "Never") != "Never"
            ):
                yield (
                    f"{group.label}: RAY_enable_autoscaler_v2 and restartPolicy are KubeRay's to set; remove "
                    "them, "
                    "autoscalerOptions.version does both"
                )


@rule
def token_is_asked_for(bundle: Bundle) -> Iterator[str]:
    """Whoever reaches Ray's ports may run anything, so all of them ask for a token, from a named secret."""
    for workload in bundle.workloads:
        options = workload.cluster.get("authOptions") or {}
        if options.get("mode") != "token" or not options.get("secretName"):
            yield (
                f"{workload.label}: authOptions is {options}; set mode: token and secretName: vz-ray-auth "
                "(without a name each new cluster has another token)"
            )
        for pod in workload.pods:
            if own := sorted({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(pod.env())):
                yield f"{pod.label}: env has {', '.join(own)}; remove it, KubeRay sets it from authOptions"


@rule
def groups_carry_their_markers(bundle: Bundle) -> Iterator[str]:
    """Each group is one that actors ask for, and tells Ray so by a resource of its name."""
    for group in bundle.groups:
        if group.name not in NODE_GROUPS:
            yield f"{group.label}: there is no group of this name; it must be one of {', '.join(NODE_GROUPS)}"
        elif group.resources.get(group.name) != 1:
            yield (
                f"{group.label}: Ray is told of {group.resources.get(group.name, 0):g} {group.name}; "
                f'set resources: {{{group.name}: "1"}}, which its actors ask for'
            )
        told = sorted({"num-cpus", "num-gpus", "memory", "resources"} & set(group.ray_start_params))
        if told and group.group_spec.get("resources"):
            yield (
                f"{group.label}: rayStartParams has {', '.join(told)} beside resources, which KubeRay "
                "refuses; "
                "keep resources alone"
            )
        if stray := sorted(group.node_group_resources - set(NODE_GROUPS)):
            yield f"{group.label}: nobody asks for {', '.join(stray)}; markers are {', '.join(NODE_GROUPS)}"
        label = group.labels.get("vz-ray/group")
        if label != group.name:
            yield (
                f"{group.label}: the label vz-ray/group is {label}; set {group.name}, policies and budgets "
                "select by it"
            )


@rule
def spot_is_for_who_may_go(bundle: Bundle) -> Iterator[str]:
    """Pods that tolerate spot machines are of a group that may lose them, and Ray is told."""
    for group in bundle.groups:
        taints = [t.get("key") for t in group.spec.get("tolerations") or [] if t.get("key") in SPOT_TAINTS]
        everything = any("key" not in t for t in group.spec.get("tolerations") or [])
        may_go = bool(taints) or everything
        if (may_go or group.spot) and (
            group.name in ("head", "learner") or "learner" in group.node_group_resources
        ):
            yield (
                f"{group.label}: it may land on spot machines, where a run would end; remove the tolerations "
                "and label"
            )
        elif may_go != group.spot:
            yield (
                f"{group.label}: it tolerates {', '.join(map(str, taints)) or 'no spot taint'}, and its "
                "label "
                f"ray.io/market-type says {'spot' if group.spot else 'nothing'}; give it both or neither "
                f"(taints: {', '.join(SPOT_TAINTS)})"
            )
