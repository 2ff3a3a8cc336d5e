"""The clip pool's size, deadlines and limits."""

from __future__ import annotations

from dataclasses import dataclass, field

DECODERS = ("pyav", "torchcodec")


@dataclass
class ClipsConfig:
    """Who decodes, how long it may take, and what is refused."""

    decoder: str = "pyav"
    """What decodes: `pyav`, or `torchcodec` where that and FFmpeg's libraries are installed."""
    num_actors: int = 2
    """Decode actors, each a process."""
    threads_per_actor: int = 2
    """Parts in which an actor decodes a request that spans several GOPs, at once (`pyav` only)."""
    max_actors: int = 0
    """Most decode actors: further ones are started while requests queue up; 0 keeps them at `actors`."""
    upscale_queue_length: int = 4
    """Requests per actor, waiting and in progress, above which further actors are started."""
    upscale_delay_s: float = 5.0
    """Seconds that requests must queue up before actors are started."""
    downscale_delay_s: float = 60.0
    """Seconds that an actor must have been too many before it is ended."""
    cpus_per_actor: float = 0.5
    """CPUs that Ray reserves for each actor; 0 shares them with whatever else runs."""
    node_group: str = ""
    """Actors are placed on nodes that have a Ray resource of this name; empty allows all."""
    timeout_s: float = 60.0
    """Seconds that one attempt at a request may take, waiting in the actor's queue included."""
    max_attempts: int = 3
    """Actors that a request is tried on before it is given up."""
    quarantine_after: int = 3
    """A video is given up when requests for it took this many decoders in a row with them."""
    queue_timeout_s: float = 600.0
    """Longest wait for a turn: at the cap on bytes in flight, or behind suspects being tried again."""
    max_in_flight_mib: int = 1024
    """Frames that one handle may have asked for and not received yet, MB; others wait their turn."""
    max_load_imbalance: int = 8
    """A video's own actor is passed over when it has this many requests more than the idlest one."""
    memory_cache_mib: int = 256
    """Decoded frames that each actor keeps in memory, MB."""
    disk_cache_gib: float = 20.0
    """Decoded frames, and what scans found, that actors keep on the machine's disk, GB; 0 keeps none."""
    disk_cache_dir: str = ""
    """Where frames and downloads are kept, on a local disk; empty takes the user's cache directory."""
    allowed_dirs: list[str] = field(default_factory=list)
    """The only directories that video files may be in; empty allows all."""
    allowed_schemes: list[str] = field(default_factory=lambda: ["http", "https"])
    """URL schemes that are fetched; object stores (`s3`, `gs`) use this machine's own credentials."""
    allowed_hosts: list[str] = field(default_factory=list)
    """The only hosts or buckets that are fetched from; empty allows all public ones."""
    allowed_private_hosts: list[str] = field(default_factory=list)
    """Hosts that may have addresses that are not public, such as a cluster's own object store."""
    max_download_gib: float = 8.0
    """Largest file that is fetched, GB."""
    download_timeout_s: float = 600.0
    """Longest download, seconds."""
    download_cache_gib: float = 100.0
    """Files fetched that are kept on the machine's disk, GB; the least recently used go first."""
    max_open_videos: int = 8
    """Videos that each actor keeps open."""
    max_rss_mib: int = 4096
    """An actor whose memory has grown above this ends when it is idle, and Ray starts it anew."""
    max_duration_s: float = 28800.0
    """Longest video that is accepted, seconds."""
    max_pixels: int = 37748736
    """Largest coded frame that is accepted, pixels (8192 x 4608)."""
    max_request_frames: int = 4096
    """Most frames that one request may ask for."""

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(f"clips.decoder is {self.decoder!r}; it must be one of {', '.join(DECODERS)}")
        for name in (
            "num_actors",
            "threads_per_actor",
            "upscale_queue_length",
            "max_attempts",
            "quarantine_after",
            "max_in_flight_mib",
            "max_load_imbalance",
            "max_open_videos",
            "max_rss_mib",
            "max_pixels",
            "max_request_frames",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"clips.{name} is {value}; it must be at least 1")
        for name in (
            "timeout_s",
            "queue_timeout_s",
            "max_duration_s",
            "max_download_gib",
            "download_timeout_s",
            "download_cache_gib",
        ):
            if (seconds := getattr(self, name)) <= 0:
                raise ValueError(f"clips.{name} is {seconds}; it must be more than 0")
        for name in (
            "cpus_per_actor",
            "memory_cache_mib",
            "disk_cache_gib",
            "upscale_delay_s",
            "downscale_delay_s",
        ):
            if (amount := getattr(self, name)) < 0:
                raise ValueError(f"clips.{name} is {amount}; it must not be negative")
        if self.max_actors and self.max_actors < self.num_actors:
            raise ValueError(
                f"clips.max_actors is {self.max_actors}, below clips.num_actors ({self.num_actors}); "
                "raise it, or leave it at 0 for a fixed number"
            )

    @property
    def actor_limit(self) -> int:
        """How many the pool may grow to."""
        return self.max_actors or self.num_actors
