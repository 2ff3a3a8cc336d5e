"""Runs as jobs on a cluster: whether one fits there, and how it is sent, followed and stopped.

needs:       what a config asks of a cluster: actors, their resources and groups; pure
fit:         where they would go, and what keeps the others out; pure
survey:      what each node says of itself: versions, directories, variables
autoscaler:  what Ray's autoscaler says cannot be had
preflight:   all of it, as checks; `vz-ray preflight`
packing:     the working directory as one file
client:      Ray's job API, with errors that name the fix
submission:  a job under a run's name: sent, found again, followed; `vz-ray submit`
drain:       a node that is about to go gets no new work; `vz-ray drain`
"""
