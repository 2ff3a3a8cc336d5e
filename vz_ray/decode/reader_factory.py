"""Construction of clip readers from the configuration."""

from __future__ import annotations

from vz_ray.config.clips import ClipsConfig
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.disk_cache import DiskCache, resolve_cache_dir
from vz_ray.video.remote import DownloadCache, DownloadRules
from vz_ray.video.video_file import VideoLimits, VideoLocator


def build_reader(config: ClipsConfig) -> ClipReader:
    """Return a reader with the caches, limits and allowed sources of `config`."""
    disk_cache = None
    if config.disk_cache_gib:
        disk_cache = DiskCache(resolve_cache_dir(config.disk_cache_dir) / "frames", int(config.disk_cache_gib * 2**30))
    return ClipReader(
        cache_bytes=config.memory_cache_mib * 2**20,
        max_open_videos=config.max_open_videos,
        limits=VideoLimits(config.max_duration_s, config.max_pixels, config.max_request_frames),
        disk_cache=disk_cache,
        locator=build_locator(config),
        decoder=config.decoder,
        num_threads=config.threads_per_actor,
    )


def build_locator(config: ClipsConfig) -> VideoLocator:
    """Return a locator for the allowed directories and URLs."""
    root = resolve_cache_dir(config.disk_cache_dir) / "downloads"
    downloads = DownloadCache(root, int(config.download_cache_gib * 2**30), build_download_rules(config))
    return VideoLocator(downloads, config.allowed_dirs)


def build_download_rules(config: ClipsConfig) -> DownloadRules:
    """Return the rules for downloads."""
    return DownloadRules(
        schemes=tuple(config.allowed_schemes),
        hosts=tuple(config.allowed_hosts),
        private_hosts=tuple(config.allowed_private_hosts),
        max_file_bytes=int(config.max_download_gib * 2**30),
        timeout_s=config.download_timeout_s,
    )
