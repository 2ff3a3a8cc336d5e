"""A clip reader as the configuration asks for it."""

from __future__ import annotations

from vz_ray.config.clips import ClipsConfig
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.disk import DiskStore, cache_directory
from vz_ray.video.remote import Downloads, RemoteRules
from vz_ray.video.source import Limits, Sources


def open_reader(config: ClipsConfig) -> ClipReader:
    """Its caches, limits and sources are those of `config`."""
    disk = None
    if config.disk_gb:
        disk = DiskStore(cache_directory(config.disk_dir) / "frames", int(config.disk_gb * 2**30))
    return ClipReader(
        cache_bytes=config.cache_mb * 2**20,
        videos=config.open_videos,
        limits=Limits(config.max_duration_s, config.max_pixels, config.max_request_frames),
        disk=disk,
        sources=sources(config),
        decoder=config.decoder,
        threads=config.threads,
    )


def sources(config: ClipsConfig) -> Sources:
    """Where videos may come from."""
    root = cache_directory(config.disk_dir) / "downloads"
    downloads = Downloads(root, int(config.downloads_gb * 2**30), remote_rules(config))
    return Sources(downloads, config.roots)


def remote_rules(config: ClipsConfig) -> RemoteRules:
    """Which URLs are fetched."""
    return RemoteRules(
        schemes=tuple(config.schemes),
        hosts=tuple(config.hosts),
        private_hosts=tuple(config.private_hosts),
        file_bytes=int(config.download_gb * 2**30),
        seconds=config.download_s,
    )
