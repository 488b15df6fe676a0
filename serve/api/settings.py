"""Settings of a server, except for its models."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from serve.api import auth
from serve.settings import data_folder


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to any address


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Return the accepted Host names, besides the loopback names, of a server bound to `host`.

    A server bound to every interface accepts every name, because its machine may have any name.
    That is safe: such a server always requires a key, and the check protects servers without keys.
    """
    if host in ("0.0.0.0", "::"):
        return ("*",)
    return () if is_loopback(host) else (host,)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server, except for its models.

    Attributes:
        host: Address to bind. An address beyond loopback requires a key, here or in the data
            folder.
        port: Port to bind; 0 lets the system choose.
        api_keys: Accepted bearer keys besides those of the data folder. If there are none at all,
            requests need no key.
        allowed_hosts: Names accepted in `Host` besides the loopback names; `"*"` accepts all.
        allowed_origins: Web origins that may call the API from a browser.
        max_body_bytes: Largest request body, in bytes; file uploads may be larger.
        requests_per_minute: Number of requests that a client may make; 0 for no limit.
        answer_timeout: Longest time to compute a response, in seconds.
        cache_budget: Memory for the KV cache of each loaded model, in bytes. The shapes of compiled
            programs depend on it, and on no other setting.
        memory_limit: Memory for all loaded models and their caches, in bytes; None for the free
            memory.
        max_embedding_tokens: Longest input of embedding models, in tokens; None for each model's
            context length.
        allow_pull: Whether requests may pull models of the catalogue and of the hub.
        is_strict: Whether a request field without effect is an error.
        store_responses: Whether responses, conversations and chat completions may be stored.
        max_stored_bytes: Limit on the texts of stored responses, in bytes.
        max_stored_days: Age at which stored responses are deleted, in days.
        home: The data folder.

    Raises:
        ValueError: A field is out of range, the key file is damaged, or the server would be open to
            the network without a key.
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
    allow_pull: bool = False
    is_strict: bool = False
    store_responses: bool = True
    max_stored_bytes: int = 256 * 2**20
    max_stored_days: float = 30.0
    home: Path = field(default_factory=data_folder)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: use 1 to 65535, or 0 for any free port")
        if any(not key.strip() for key in self.api_keys):
            raise ValueError("api_keys holds an empty key: remove it, or replace it with a secret")
        for name in ("max_body_bytes", "cache_budget", "memory_limit"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use a positive number of bytes")
        if self.requests_per_minute < 0:
            raise ValueError(
                f"requests_per_minute is {self.requests_per_minute}: use a positive number, or 0 "
                "for no limit"
            )
        if not self.answer_timeout > 0:
            raise ValueError(f"answer_timeout is {self.answer_timeout}: use more than 0 seconds")
        if not self.requires_key and not is_loopback(self.host):
            raise ValueError(
                f"host is {self.host}, which the network can reach, and there is no API key. "
                "Create a key (pellucid keys create NAME), pass one (--api-key or "
                "PELLUCID_API_KEY), or bind to 127.0.0.1"
            )

    @property
    def requires_key(self) -> bool:
        """Whether a server with these settings requires a key."""
        return bool(self.api_keys or auth.read(self.home))
