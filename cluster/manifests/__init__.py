"""Kubernetes manifests: rendered, held to schemas, and held to rules of this project.

    python -m cluster.manifests check                            # all overlays
    python -m cluster.manifests check k8s/overlays/16gpu-paper
    python -m cluster.manifests render k8s/overlays/16gpu-paper
    python -m cluster.manifests rules

| | |
|---|---|
| `kustomize` | from folders to manifests, with the real Kustomize or by itself |
| `patches` | merge patches and JSON patches, which `kustomize` applies |
| `objects` | what rules ask about: workloads, groups of pods, quantities |
| `schema` | KubeRay's schemas, Kubernetes' own, with unknown fields refused |
| `rules/` | one function for each thing that schemas cannot know |
| `dockerfile` | the same for cluster/docker/ |

In: a folder with a kustomization.yaml. Out: manifests, or findings that name the object, the value and the
fix. It asks no cluster anything.
"""

from cluster.manifests.check import Finding, check
from cluster.manifests.kustomize import render
from cluster.manifests.objects import Bundle

__all__ = ["Bundle", "Finding", "check", "render"]
