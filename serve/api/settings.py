"""How a server is set up: everything about it but its models."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from serve.api import auth
from serve.settings import data_folder


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: it may resolve to anything


def allowed_hosts(host: str) -> tuple[str, ...]:
    """The names beside the loopback ones by which a server bound to `host` may be called.

    A server bound to every interface is known by names we cannot guess, so there any name will do:
    it always has keys, and the check of names protects those that have none.
    """
    if host in ("0.0.0.0", "::"):
        return ("*",)
    return () if is_loopback(host) else (host,)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Everything about a server but its models.

    Attributes:
        host: Address to bind. Beyond loopback it needs a key, here or in the data folder.
        port: Port to bind; 0 lets the system choose.
        api_keys: Accepted bearer keys beside those of the data folder. Where there is none at
            all, any key, or none, is accepted.
        allowed_hosts: Names accepted in `Host` beside the loopback ones; `"*"` accepts all.
        allowed_origins: Web origins that may call the API from a browser.
        max_body_bytes: Largest accepted request body, in bytes; uploads of files may be larger.
        requests_per_minute: How many requests a client may make; 0 for no limit.
        answer_timeout: Longest time that an answer may take to compute, in seconds.
        cache_budget: Memory for keys and values of the conversations of each loaded model, in
            bytes. What programs are compiled for depends on it, and on nothing else that changes.
        memory_limit: Memory for all loaded models, caches included, in bytes; None for what is
            free.
        max_embedding_tokens: Longest input of embedding models, in tokens; None for what each is
            made for.
        home: The data folder.

    Raises:
        ValueError: A field is out of range, the file of keys is damaged, or the server would be
            open to others without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    requests_per_minute: int = 0
    answer_timeout: float = 600.0
    cache_budget: int = 256 * 2**20
    memory_limit: int | None = None
    max_embedding_tokens: int | None = None
    home: Path = field(default_factory=data_folder)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: use 0 to 65535, 0 for any free one")
        if any(not key.strip() for key in self.api_keys):
            raise ValueError("api_keys holds an empty key: it would let anybody in")
        for name in ("max_body_bytes", "cache_budget", "memory_limit"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use a positive number of bytes")
        if self.requests_per_minute < 0:
            raise ValueError(
                f"requests_per_minute is {self.requests_per_minute}: use 0 for no limit, or more"
            )
        if not self.answer_timeout > 0:
            raise ValueError(f"answer_timeout is {self.answer_timeout}: use more than 0 seconds")
        if not self.requires_key and not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host}, which others on the network can reach, and there is no API "
                "key: anybody could use this machine. Make a key (pellucid keys create NAME), give "
                "one (--api-key or PELLUCID_API_KEY), or bind to 127.0.0.1"
            )

    @property
    def requires_key(self) -> bool:
        """Whether a server started now would ask for a key."""
        return bool(self.api_keys or auth.read(self.home))
