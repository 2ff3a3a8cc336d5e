"""Run vz_ray as Ray jobs on a cluster: pre-flight checks, submission, job control.

resource_demands: actors that a config starts, with their resources and node groups; pure
cluster_fit:      placement of these actors on the nodes; pure
node_survey:      versions, directories, environment variables and GPUs of each node
autoscaler_state: resources that Ray's autoscaler cannot provide
gpu_checks:       GPUs of this machine; `vz-ray doctor --gpu`
gpu_preflight:    GPUs of the cluster's nodes
preflight:        all checks together; `vz-ray preflight`
working_dir:      working directory of a job as a zip file
job_client:       client of Ray's job API with timeouts and helpful errors
job_lifecycle:    jobs under a run's name: submit, find, follow, stop
submit:           body of `vz-ray submit`
node_drain:       mark a node as draining; `vz-ray drain`
doctor:           checks of the local environment; `vz-ray doctor`
"""
