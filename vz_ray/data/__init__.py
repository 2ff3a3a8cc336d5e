"""Tasks: questions about videos, and where they come from.

In: files of the RL schema, or a seed for the needle world. Out: `Task`s.
Knows nothing of engines or learners.
"""
