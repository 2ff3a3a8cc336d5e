"""The training loop: GRPO and SFT runs, their state, checkpoints and restarts."""
