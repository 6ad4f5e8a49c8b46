"""`ServerSettings`: where the server listens and what it takes, checked when built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid.errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings:
    """Checked when built.

    host, port: where to listen; port 0 takes any that is free. api_key: what clients must give, None for no key.
    max_body: bytes of a request. max_connections: open at once. cors: origins whose web pages may ask. grace: seconds
    that answers may go on once the server is asked to end. patience: seconds that a client may take to read or to send
    the next piece. slots: answers that the engine makes at once, for /props.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    max_body: int = 8 * 2**20
    max_connections: int = 1024
    cors: tuple[str, ...] = ()
    grace: float = 5.0
    patience: float = 60.0
    slots: int = 32

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("port", self.port, 0, 65535),
            ("max_body", self.max_body, 1, 2**40),
            ("max_connections", self.max_connections, 1, 2**20),
            ("grace", self.grace, 0, 86400),
            ("patience", self.patience, 0.01, 86400),
        ):
            if not (math.isfinite(value) and least <= value <= most):
                raise InputError(f"{name.replace('_', ' ')} is {value}, expected {least} to {most}", setting=name)
        if self.api_key is not None and not (self.api_key and self.api_key.isprintable()):
            raise InputError("the API key is empty or has control characters; give another", setting="api_key")

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it without a key."""
        return self.host not in LOOPBACK and self.api_key is None
