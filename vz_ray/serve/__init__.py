"""Serve a trained agent behind an OpenAI-compatible endpoint, on Ray Serve.

In: HTTP requests about videos. Out: answers, with every zoom of the episode.
`app` assembles an `Ingress` (FastAPI, no GPU), which validates requests and streams responses, and `Agent`
replicas (one vLLM engine and its decoders each), which run each request as an episode of the environment.
Must not import training.
"""
