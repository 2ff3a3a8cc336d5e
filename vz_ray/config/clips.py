"""Config of the decode pool: size, limits, caches, allowed sources."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.derived import timeout
from vz_ray.config.validation import (
    InvalidValueError,
    check_choice,
    check_min,
    check_not_negative,
    check_positive,
)

DECODERS = ("pyav", "torchcodec")


@dataclass
class ClipsConfig:
    """The decode pool and the video files that it accepts."""

    decoder: str = "pyav"
    """Decoder library: `pyav`, or `torchcodec`, which needs FFmpeg's shared libraries."""
    num_actors: int = 2
    """Decode actors, one process each."""
    threads_per_actor: int = 2
    """Parallel parts of a request that spans several GOPs (`pyav` only)."""
    max_actors: int = 0
    """Maximum decode actors, started while requests queue; 0 keeps `num_actors`."""
    upscale_queue_length: int = 4
    """Waiting and running requests per actor above which the pool starts actors."""
    upscale_delay_s: float = 5.0
    """Seconds that requests must queue before the pool starts actors."""
    downscale_delay_s: float = 60.0
    """Seconds that an actor must be unneeded before the pool stops it."""
    cpus_per_actor: float = 0.5
    """CPUs that Ray reserves per actor; 0 reserves none."""
    node_group: str = ""
    """Ray resource of the nodes for the actors; empty allows every node."""
    timeout_s: float = timeout("decode_s")
    """Timeout of one attempt, including its wait in the actor's queue."""
    max_attempts: int = 3
    """Maximum attempts at a request, each on another actor."""
    quarantine_after: int = 3
    """Consecutive decoder crashes after which a video is rejected."""
    queue_timeout_s: float = timeout("decode_queue_s")
    """Maximum wait for `max_in_flight_mib`, or behind quarantined videos."""
    max_in_flight_mib: int = 1024
    """Maximum decoded frames in flight per client, in MiB; further requests wait."""
    max_load_imbalance: int = 8
    """Difference in queue length above which a request goes to the least loaded actor instead of the actor
    that caches the video."""
    memory_cache_mib: int = 256
    """Memory cache of decoded frames per actor, in MiB."""
    disk_cache_gib: float = 20.0
    """Disk cache of decoded frames and video scans per machine, in GiB; 0 disables it."""
    disk_cache_dir: str = ""
    """Directory of cached frames and downloads, on a local disk; default: the user's cache directory."""
    allowed_dirs: list[str] = field(default_factory=list)
    """Directories that may contain video files; empty allows all."""
    allowed_schemes: list[str] = field(default_factory=lambda: ["http", "https"])
    """URL schemes that are fetched; object stores (`s3`, `gs`) use the machine's credentials."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Hosts or buckets that are fetched from; empty allows all public hosts."""
    allowed_private_hosts: list[str] = field(default_factory=list)
    """Hosts that may have private addresses, for example the cluster's object store."""
    max_download_gib: float = 8.0
    """Maximum size of a fetched file, in GiB."""
    download_timeout_s: float = timeout("download_s")
    """Timeout of one download."""
    download_cache_gib: float = 100.0
    """Disk cache of fetched files per machine, in GiB; the least recently used files are evicted first."""
    max_open_videos: int = 8
    """Maximum open videos per actor."""
    max_rss_mib: int = 4096
    """Resident memory in MiB above which an idle actor exits; Ray restarts it."""
    max_duration_s: float = 28800.0
    """Maximum duration of a video in seconds."""
    max_pixels: int = 37748736
    """Maximum area of a coded frame in pixels (8192 x 4608)."""
    max_request_frames: int = 4096
    """Maximum frames of one request."""

    def __post_init__(self) -> None:
        check_choice(self, "decoder", DECODERS)
        check_min(self, 1, "num_actors", "threads_per_actor", "upscale_queue_length", "max_attempts")
        check_min(self, 1, "quarantine_after", "max_in_flight_mib", "max_load_imbalance", "max_open_videos")
        check_min(self, 1, "max_rss_mib", "max_pixels", "max_request_frames")
        check_positive(self, "max_duration_s", "max_download_gib", "download_cache_gib")
        check_not_negative(self, "cpus_per_actor", "memory_cache_mib", "disk_cache_gib")
        check_not_negative(self, "upscale_delay_s", "downscale_delay_s")
        if self.max_actors and self.max_actors < self.num_actors:
            raise InvalidValueError(
                "max_actors",
                f"is {self.max_actors}; it must be at least num_actors ({self.num_actors}), or 0 for a fixed number",
                "num_actors",
            )

    @property
    def actor_limit(self) -> int:
        """Maximum number of actors."""
        return self.max_actors or self.num_actors
