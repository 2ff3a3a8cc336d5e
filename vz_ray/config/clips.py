"""Config of the decode pool: size, limits, caches, allowed sources."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.fields import Section, check_at_least, choice, number
from vz_ray.config.timeouts import timeout


@dataclass
class ClipsConfig(Section):
    """The decode pool and the video files that it accepts."""

    decoder: str = choice("pyav", "torchcodec")
    """Decoder library: `pyav`, or `torchcodec`, which needs FFmpeg's shared libraries."""
    num_actors: int = number(2, minimum=1)
    """Decode actors, one process each."""
    threads_per_actor: int = number(2, minimum=1)
    """Parallel parts of a request that spans several GOPs (`pyav` only)."""
    max_actors: int = 0
    """Maximum decode actors, started while requests queue; 0 keeps `num_actors`."""
    upscale_queue_length: int = number(4, minimum=1)
    """Waiting and running requests per actor above which the pool starts actors."""
    upscale_delay_s: float = number(5.0, minimum=0)
    """Seconds that requests must queue before the pool starts actors."""
    downscale_delay_s: float = number(60.0, minimum=0)
    """Seconds that an actor must be unneeded before the pool stops it."""
    cpus_per_actor: float = number(0.5, minimum=0)
    """CPUs that Ray reserves per actor; 0 reserves none."""
    node_group: str = ""
    """Ray resource of the nodes for the actors; empty allows every node."""
    timeout_s: float = timeout("decode_s")
    """Timeout of one attempt, including its wait in the actor's queue."""
    max_attempts: int = number(3, minimum=1)
    """Maximum attempts at a request, each on another actor."""
    quarantine_after: int = number(3, minimum=1)
    """Consecutive decoder crashes after which a video is rejected."""
    queue_timeout_s: float = timeout("decode_queue_s")
    """Maximum wait for `max_in_flight_mib`, or behind quarantined videos."""
    max_in_flight_mib: int = number(1024, minimum=1)
    """Maximum decoded frames in flight per client, in MiB; further requests wait."""
    max_load_imbalance: int = number(8, minimum=1)
    """Difference in queue length above which a request goes to the least loaded actor instead of the actor
    that caches the video."""
    memory_cache_mib: int = number(256, minimum=0)
    """Memory cache of decoded frames per actor, in MiB."""
    disk_cache_gib: float = number(20.0, minimum=0)
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
    max_download_gib: float = number(8.0, above=0)
    """Maximum size of a fetched file, in GiB."""
    download_timeout_s: float = timeout("download_s")
    """Timeout of one download."""
    download_cache_gib: float = number(100.0, above=0)
    """Disk cache of fetched files per machine, in GiB; the least recently used files are evicted first."""
    max_open_videos: int = number(8, minimum=1)
    """Maximum open videos per actor."""
    max_rss_mib: int = number(4096, minimum=1)
    """Resident memory in MiB above which an idle actor exits; Ray restarts it."""
    max_duration_s: float = number(28800.0, above=0)
    """Maximum duration of a video in seconds."""
    max_pixels: int = number(37748736, minimum=1)
    """Maximum area of a coded frame in pixels (8192 x 4608)."""
    max_request_frames: int = number(4096, minimum=1)
    """Maximum frames of one request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_actors:
            check_at_least(self, "max_actors", "num_actors", ", or 0 for a fixed number")

    @property
    def actor_limit(self) -> int:
        """Maximum number of actors."""
        return self.max_actors or self.num_actors
