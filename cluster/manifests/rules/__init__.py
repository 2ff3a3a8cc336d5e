"""What schemas cannot know: one function for each thing that was seen to go wrong, or would.

| file | about |
|---|---|
| `pods` | what a pod asks for, mounts and may do |
| `ray` | groups, versions, autoscaling, the token |
| `jobs` | entrypoints, checkpoints, what is done before a pod ends |
| `names` | what is named exists: volumes, claims, secrets, pods of a budget, ports |
"""

from cluster.manifests.rules import jobs, names, pods, ray
from cluster.manifests.rules.registry import RULES

__all__ = ["RULES", "jobs", "names", "pods", "ray"]
