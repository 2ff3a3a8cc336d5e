"""Tasks: questions about videos, and where they come from.

In: files of the RL schema, or a seed for the needle world. Out: `Task`s.
Trajectories have their files here too: episode logs, and the SFT layout.
Knows nothing of engines or learners.
"""
