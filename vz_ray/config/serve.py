"""Who may ask the served agent, how much they may send, and what it keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class GuardConfig:
    """Keys, hosts, and limits on what clients send."""

    keys: str = ""
    """File of API keys, written by `vz-ray keys`; empty takes keys from the environment alone."""
    keys_env: str = "VZ_RAY_KEYS"
    """Environment variable with hashes of further keys, `NAME:HASH` or `NAME:HASH:EXPIRY`, spaces between."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Host names by which the server may be asked; empty allows all with keys, and loopback alone without."""
    json_mb: float = 64.0
    """Largest body of a JSON request, MB; videos and images inside it (`data:` URIs) count in full."""
    upload_gb: float = 8.0
    """Largest body of an upload, GB."""
    body_s: float = 60.0
    """Longest time that the body of a JSON request may take to arrive, seconds."""
    upload_s: float = 3600.0
    """Longest time that an upload may take to arrive, seconds."""
    min_kb_s: float = 8.0
    """Slowest that a body may arrive, KB/s, over any stretch of `grace_s`."""
    grace_s: float = 15.0
    """Seconds after which a body that arrives more slowly than `min_kb_s` is given up."""
    requests_per_key: int = 16
    """Requests that one key may have in progress at a time, at each server process."""
    session_hours: float = 12.0
    """How long a browser stays logged in, hours."""

    def __post_init__(self) -> None:
        for name in ("json_mb", "upload_gb", "body_s", "upload_s", "min_kb_s", "grace_s", "session_hours"):
            if (amount := getattr(self, name)) <= 0:
                raise ValueError(f"guard.{name} is {amount}; it must be more than 0")
        if self.requests_per_key < 1:
            raise ValueError(f"guard.requests_per_key is {self.requests_per_key}; it must be at least 1")
        for host in self.allowed_hosts:
            if not host or host != host.lower() or any(sign in host for sign in "/*@ "):
                raise ValueError(
                    f"guard.allowed_hosts has {host!r}; give lower-case names without scheme or wildcard, "
                    "such as videos.example.org"
                )
            if ":" in host and not (host.startswith("[") and host.endswith("]")):
                raise ValueError(
                    f"guard.allowed_hosts has {host!r}; give it without a port, an IPv6 address in brackets"
                )


@dataclass
class FilesConfig:
    """Where uploads are kept, how many and how long, and which of the server's own files may be named."""

    directory: str = ""
    """Where uploads are kept, on a disk that the decoders see too; empty takes the user's cache directory."""
    files_gb: float = 50.0
    """Uploads and media sent inline, of all keys together, GB."""
    days: float = 7.0
    """A file is deleted when it was not used for as many days."""
    roots: list[str] = field(default_factory=list)
    """Directories of the server in which a request may name files by their paths; empty allows none."""

    def __post_init__(self) -> None:
        for name in ("files_gb", "days"):
            if (amount := getattr(self, name)) <= 0:
                raise ValueError(f"files.{name} is {amount}; it must be more than 0")
        for root in self.roots:
            if not root.startswith("/"):
                raise ValueError(f"files.roots has {root!r}; give an absolute path")
            if not root.strip("/"):
                raise ValueError("files.roots has '/', which is every file of the server; name directories")
