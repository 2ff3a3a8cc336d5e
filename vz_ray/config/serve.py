"""Config of the server."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.fields import InvalidValueError, Section, check_at_least, derived, number, set_derived_values
from vz_ray.config.monitoring import LoggingConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.config.timeouts import ServeTimeoutsConfig


@dataclass
class AccessConfig(Section):
    """API keys, host names, and limits on requests."""

    keys_file: str = ""
    """File of API keys from `vz-ray keys`; empty uses only the environment variable."""
    keys_env: str = "VZ_RAY_KEYS"
    """Environment variable with hashes of further keys, `NAME:HASH` or `NAME:HASH:EXPIRY`, separated by
    spaces."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names that requests may use; empty allows all with keys, and only loopback without keys."""
    max_json_mib: float = number(64.0, above=0)
    """Maximum body of a JSON request in MiB, including inline videos and images (`data:` URIs)."""
    max_upload_gib: float = number(2.0, above=0)
    """Maximum body of an upload in GiB; Ray Serve's proxy may hold all of it in memory if the disk is
    slow."""
    json_timeout_s: float = derived(ServeTimeoutsConfig.json_body_s, "timeouts.json_body_s")
    """Timeout of receiving a JSON body."""
    upload_timeout_s: float = derived(ServeTimeoutsConfig.upload_s, "timeouts.upload_s")
    """Timeout of receiving an upload."""
    min_kib_per_s: float = number(8.0, above=0)
    """Minimum upload rate in KiB/s, over any interval of `grace_s`."""
    grace_s: float = number(15.0, above=0)
    """Seconds below `min_kib_per_s` after which a body is rejected."""
    max_requests_per_key: int = number(16, minimum=1)
    """Maximum concurrent requests per key and server process."""
    session_hours: float = number(12.0, above=0)
    """Lifetime of a browser session in hours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for host in self.allowed_hosts:
            if not host or host != host.lower() or any(sign in host for sign in "/*@ "):
                raise InvalidValueError(
                    "allowed_hosts",
                    f"has {host!r}; a host must be a lower-case name without scheme or wildcard, for example "
                    "videos.example.org",
                )
            if ":" in host and not (host.startswith("[") and host.endswith("]")):
                raise InvalidValueError(
                    "allowed_hosts",
                    f"has {host!r}; a host must have no port, and an IPv6 address must be in brackets",
                )


@dataclass
class UploadsConfig(Section):
    """Uploads, and files of the server that requests may use."""

    directory: str = ""
    """Directory of uploads, on a disk that the decoders can read; default: the user's cache directory."""
    max_gib: float = number(50.0, above=0)
    """Maximum size of all uploads and inline media in GiB."""
    ttl_days: float = number(7.0, above=0)
    """Days after its last use when a file is deleted."""
    allowed_dirs: list[str] = field(default_factory=list)
    """Directories of the server with files that requests may use by path; empty allows none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for directory in self.allowed_dirs:
            if not directory.startswith("/"):
                raise InvalidValueError("allowed_dirs", f"has {directory!r}; it must be an absolute path")
            if not directory.strip("/"):
                raise InvalidValueError("allowed_dirs", "has '/', which is every file of the server; name directories")


@dataclass
class ServeConfig(Section):
    """Config of `vz-ray serve`."""

    model: str = ""
    """Checkpoint directory of the agent, at the same path on every node."""
    name: str = "zoomer"
    """Model name in requests; `name@3` is the third version of its weights."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback requires API keys."""
    port: int = number(8000, minimum=0)
    """Port to listen on; 0 chooses a free port."""
    log_dir: str = "runs/serve"
    """Directory of the engines' logs on each node."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Limits and prompts of an episode."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """vLLM engine of each replica."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """Decode pool of each replica."""
    timeouts: ServeTimeoutsConfig = field(default_factory=ServeTimeoutsConfig)
    """Timeouts."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray cluster."""
    monitoring: LoggingConfig = field(default_factory=LoggingConfig)
    """Format of log files."""
    access: AccessConfig = field(default_factory=AccessConfig)
    """API keys and request limits."""
    files: UploadsConfig = field(default_factory=UploadsConfig)
    """Uploads, and files of the server that requests may use."""
    temperature: float = number(0.0, minimum=0)
    """Default sampling temperature; 0 is greedy."""
    min_replicas: int = number(1, minimum=1)
    """Minimum engines."""
    max_replicas: int = 1
    """Maximum engines, started while requests queue."""
    max_ongoing_requests: int = number(32, minimum=1)
    """Maximum concurrent requests per engine."""
    target_ongoing_requests: int = number(16, minimum=1)
    """Requests per engine above which replicas are added."""
    max_queued_requests: int = number(64, minimum=0)
    """Maximum queued requests; further ones get status 503."""
    retry_after_s: float = number(5.0, above=0)
    """`Retry-After` of a refused request, in seconds."""
    cpus_per_replica: float = number(1.0, minimum=0)
    """CPUs that Ray reserves per engine."""
    node_group: str = ""
    """Ray resource of the nodes for the engines; empty allows every node."""
    max_messages: int = number(256, minimum=1)
    """Maximum messages of a conversation."""
    max_text_chars: int = number(200_000, minimum=1)
    """Maximum characters of a conversation's text."""
    max_videos: int = number(8, minimum=0)
    """Maximum videos of a request."""
    max_images: int = number(16, minimum=0)
    """Maximum images of a request."""
    log_prompts: bool = False
    """Log questions and answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        set_derived_values(self)
        check_at_least(self, "max_replicas", "min_replicas")
        if not self.name or "@" in self.name or "/" in self.name:
            raise InvalidValueError("name", f"is {self.name!r}; it must be a word without '@' and '/'")

    @property
    def images_per_prompt(self) -> int:
        """Maximum frames of a conversation on the engines."""
        return self.episode.max_images

    @property
    def max_num_seqs(self) -> int:
        """Maximum turns in one batch of an engine."""
        return self.max_ongoing_requests
