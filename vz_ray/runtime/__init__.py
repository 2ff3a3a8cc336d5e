"""Assembly of a run: Ray cluster, run directory, decode pool, learner, rollout workers, monitor.

Input: the config of a command. Output: context managers that start the parts and close them on exit. Imports
every part that it assembles; no training loop, evaluation or server.
"""
