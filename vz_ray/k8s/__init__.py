"""Kubernetes manifests from a config: `vz-ray k8s render`, `check` and `diff`.

run_spec:   a run as its pods start it: command, overrides, config
pod_group:  pods of a node group, and whether one fits a node; pure
pod_sizes:  pods of each node group, from the plan of the run and the nodes of the site; pure
pod_spec:   a pod template
render:     RayJob, RayCluster or RayService with its disruption budgets
manifest:   access to rendered manifests
rules:      rules that only this project can check; `vz-ray k8s check`
live:       comparison with a cluster through kubectl; `vz-ray k8s diff`, `check --cluster`
"""
