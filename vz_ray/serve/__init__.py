"""A trained agent behind an OpenAI-compatible endpoint, on Ray Serve.

In: HTTP requests about videos. Out: answers, and every zoom on the way to them.
`app` puts it together: an `Ingress` (FastAPI, no GPU) that checks requests and
streams replies, and `Agent` replicas (one vLLM engine and its decoders each)
that play each request as an episode, with the runner of training. Must not know
how the agent was trained.
"""
