"""Task files, task sampling and episode files.

Input: task files in the RL format, SFT files, episode logs. Output: `Task` and `Trajectory` objects,
and the same files. This package must not import engines or learners.
"""
