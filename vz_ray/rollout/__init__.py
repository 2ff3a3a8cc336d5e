"""Rollout: engines that sample turns, workers that play episodes, the fleet of workers.

In: tasks, clips, weights. Out: groups of scored trajectories, in whatever order
they finish. Must not know: the learner, losses or advantages.

Nothing here imports vLLM until an engine starts.
"""
