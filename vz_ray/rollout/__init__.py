"""Rollout: engines that sample turns, workers that run episodes, the pool and scheduler of workers.

In: tasks, clips, weights. Out: groups of scored trajectories in completion order. Must not import
`learner`, losses or advantages. vLLM is imported only when an engine starts.
"""
