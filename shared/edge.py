"""What the edge says of a request: whom it is with, and its id. Believed from trusted proxies only.

Pure: no I/O, no framework.
"""

import functools
import ipaddress
import re
import secrets
from collections.abc import Sequence

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")

_PEERS_CACHED = 1024


def new_request_id() -> str:
    """An id that nothing else has."""
    return secrets.token_hex(16)


class Edge:
    """Knows the proxies whose ``X-Real-IP`` and ``X-Request-ID`` count; a client's own never do."""

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        """
        Args:
            trusted_proxies: Networks, such as ``127.0.0.1/32``.
        """
        networks = [ipaddress.ip_network(network) for network in trusted_proxies]

        @functools.lru_cache(_PEERS_CACHED)
        def trusts(peer: str) -> bool:
            address = ipaddress.ip_address(peer)
            return any(address in network for network in networks)

        self._trusts = trusts

    def client_address(self, peer: str, real_ip: str | None) -> str:
        """Whom ``peer`` speaks for: the address it names if it may, or itself."""
        return real_ip if real_ip and self._trusts(peer) else peer

    def request_id(self, peer: str, given: str | None) -> str:
        """The id that ``peer`` gave the request if it may, or a new one."""
        if given and self._trusts(peer) and _REQUEST_ID.fullmatch(given):
            return given
        return new_request_id()
