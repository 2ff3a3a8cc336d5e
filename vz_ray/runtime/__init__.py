"""Assembles what a run needs: a Ray cluster, decoders, a learner, rollout workers, and the run context."""
