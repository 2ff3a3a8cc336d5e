"""The served agent: where it listens, what it plays with, how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.monitoring import LoggingConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.config.run import RayConfig


@dataclass
class AccessConfig:
    """Keys, hosts, and limits on what clients send."""

    keys_file: str = ""
    """File of API keys, written by `vz-ray keys`; empty takes keys from the environment alone."""
    keys_env: str = "VZ_RAY_KEYS"
    """Environment variable with hashes of further keys, `NAME:HASH` or `NAME:HASH:EXPIRY`, spaces between."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names by which the server may be asked; empty allows all with keys, and loopback alone without."""
    max_json_mib: float = 64.0
    """Largest body of a JSON request, MB; videos and images inside it (`data:` URIs) count in full."""
    max_upload_gib: float = 2.0
    """Largest body of an upload, GB; Ray Serve's proxy may hold as much in memory where a disk is slow."""
    json_timeout_s: float = 60.0
    """Longest time that the body of a JSON request may take to arrive, seconds."""
    upload_timeout_s: float = 3600.0
    """Longest time that an upload may take to arrive, seconds."""
    min_kib_per_s: float = 8.0
    """Slowest that a body may arrive, KB/s, over any stretch of `grace_s`."""
    grace_s: float = 15.0
    """Seconds after which a body that arrives more slowly than `min_kb_s` is given up."""
    max_requests_per_key: int = 16
    """Requests that one key may have in progress at a time, at each server process."""
    session_hours: float = 12.0
    """How long a browser stays logged in, hours."""

    def __post_init__(self) -> None:
        for name in (
            "max_json_mib",
            "max_upload_gib",
            "json_timeout_s",
            "upload_timeout_s",
            "min_kib_per_s",
            "grace_s",
            "session_hours",
        ):
            if (amount := getattr(self, name)) <= 0:
                raise ValueError(f"access.{name} is {amount}; it must be more than 0")
        if self.max_requests_per_key < 1:
            raise ValueError(
                f"access.max_requests_per_key is {self.max_requests_per_key}; it must be at least 1"
            )
        for host in self.allowed_hosts:
            if not host or host != host.lower() or any(sign in host for sign in "/*@ "):
                raise ValueError(
                    f"access.allowed_hosts has {host!r}; give lower-case names without scheme or wildcard, "
                    "such as videos.example.org"
                )
            if ":" in host and not (host.startswith("[") and host.endswith("]")):
                raise ValueError(
                    f"access.allowed_hosts has {host!r}; give it without a port, an IPv6 address in brackets"
                )


@dataclass
class UploadsConfig:
    """Where uploads are kept, how many and how long, and which of the server's own files may be named."""

    directory: str = ""
    """Where uploads are kept, on a disk that the decoders see too; empty takes the user's cache directory."""
    max_gib: float = 50.0
    """Uploads and media sent inline, of all keys together, GB."""
    ttl_days: float = 7.0
    """A file is deleted when it was not used for as many days."""
    allowed_dirs: list[str] = field(default_factory=list)
    """Directories of the server in which a request may name files by their paths; empty allows none."""

    def __post_init__(self) -> None:
        for name in ("max_gib", "ttl_days"):
            if (amount := getattr(self, name)) <= 0:
                raise ValueError(f"files.{name} is {amount}; it must be more than 0")
        for root in self.allowed_dirs:
            if not root.startswith("/"):
                raise ValueError(f"files.allowed_dirs has {root!r}; give an absolute path")
            if not root.strip("/"):
                raise ValueError(
                    "files.allowed_dirs has '/', which is every file of the server; name directories"
                )


@dataclass
class ServeConfig:
    """One agent behind one endpoint."""

    model: str = ""
    """Checkpoint directory of the agent; every node must see it at this path."""
    name: str = "zoomer"
    """What requests call it; `name@3` is its third set of weights."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback it needs API keys."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    log_dir: str = "runs/serve"
    """Directory for the engines' logs, on each node."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """What an episode may do."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What each replica's engine is started with."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """The decoders of each replica."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    monitoring: LoggingConfig = field(default_factory=LoggingConfig)
    """How log files are written."""
    access: AccessConfig = field(default_factory=AccessConfig)
    """Who may ask, and how much."""
    files: UploadsConfig = field(default_factory=UploadsConfig)
    """Uploads, and files of the server's that requests may name."""
    temperature: float = 0.0
    """Of requests that name none; 0 is greedy."""
    min_replicas: int = 1
    """Fewest engines."""
    max_replicas: int = 1
    """Most engines: further ones are started while requests wait."""
    max_ongoing_requests: int = 32
    """Requests that an engine plays at once."""
    target_ongoing_requests: int = 16
    """Requests for each engine that further ones are started above."""
    max_queued_requests: int = 64
    """Requests that may wait for a place; more are refused with status 503."""
    retry_after_s: float = 5.0
    """How long a refused client is asked to wait."""
    cpus_per_replica: float = 1.0
    """CPUs that Ray reserves for each engine."""
    node_group: str = ""
    """Engines are placed on nodes that have a Ray resource of this name; empty allows all."""
    start_timeout_s: float = 600.0
    """How long an engine may take to start."""
    turn_timeout_s: float = 120.0
    """How long a turn may take."""
    episode_timeout_s: float = 600.0
    """How long a request may take, from its first look at the video to the answer."""
    drain_timeout_s: float = 120.0
    """How long new weights wait for requests under way; those that take longer end with the new ones."""
    max_messages: int = 256
    """Most messages of a conversation."""
    max_text_chars: int = 200_000
    """Most characters of a conversation's text."""
    max_videos: int = 8
    """Most videos of a request."""
    max_images: int = 16
    """Most pictures of a request."""
    log_prompts: bool = False
    """Write questions and answers to the log; they are left out of it otherwise."""

    def __post_init__(self) -> None:
        for name in (
            "min_replicas",
            "max_ongoing_requests",
            "target_ongoing_requests",
            "max_messages",
            "max_text_chars",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below min_replicas ({self.min_replicas}); raise it"
            )
        for name in (
            "retry_after_s",
            "start_timeout_s",
            "turn_timeout_s",
            "episode_timeout_s",
            "drain_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "max_queued_requests",
            "temperature",
            "cpus_per_replica",
            "max_videos",
            "max_images",
            "port",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.name or "@" in self.name or "/" in self.name:
            raise ValueError(f"name is {self.name!r}; it must be a word without '@' and '/'")
        if self.episode.max_context > self.engine.max_model_len:
            raise ValueError(
                f"episode.max_context is {self.episode.max_context}, above engine.max_model_len "
                f"({self.engine.max_model_len}): the engine would refuse long conversations"
            )
