"""One question played: overview, zooms, answer.

Pure: wire formats, parsing of zoom calls, the episode's state machine, the
trajectories it leaves behind, and the runner that plays it against two
protocols, a `PolicyModel` and a `FrameSource`. Knows neither Ray nor vLLM nor torch.
"""
