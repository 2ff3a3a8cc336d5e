"""The zooming environment: overview, zoom calls, answer.

Pure: chat formats, zoom-call parsing, the environment's state machine, trajectory types, and the
episode runner on top of the `Policy` and `FrameSource` protocols. Must not import Ray, vLLM or torch.
"""
