"""Training runs: GRPO (`run.py`, `loop.py`) and SFT (`sft.py`), their state, checkpoints and restarts.

Input: a run config. Output: a run directory with metrics, episodes, checkpoints and the exported model. Imports
the runtime; no server, distillation or command line.
"""
