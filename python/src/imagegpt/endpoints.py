"""Addresses of workers, and the connections to them."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

__all__ = ["Address", "ConnectOptions", "Endpoint"]

# Largest response that is accepted: larger than any that a worker may be told to
# send.
RESPONSE_BYTES_MAX = (1 << 31) - 1
# Interval of HTTP/2 pings in seconds, which detect a machine that has vanished
# without closing the connection.
PING_INTERVAL = 10.0
# Addresses that all endpoints together may have. More would be a mistake of the
# name service, and each address costs a connection.
ADDRESSES_MAX = 1024
_PORT_MAX = 65535


@dataclass(frozen=True)
class Address:
    """Address of a worker: one of those that an endpoint's host name has."""

    endpoint: Endpoint
    host: str
    port: int

    def __str__(self) -> str:
        if self.host == self.endpoint.host:
            return str(self.endpoint)
        return f"{self.endpoint} ({self.host})"

    @property
    def target(self) -> str:
        """Target of the channel, which needs no lookup."""
        if ":" in self.host:
            return f"ipv6:[{self.host}]:{self.port}"
        return f"ipv4:{self.host}:{self.port}"


@dataclass(frozen=True)
class Endpoint:
    """Host and port of one worker, or of several behind one name."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @staticmethod
    def parse(text: str, tls: bool) -> Endpoint:
        """Parses ``HOST:PORT``, ``http://HOST:PORT``, ``https://HOST:PORT`` or
        ``dns:///HOST:PORT``. ``tls`` is for the forms that do not say.

        Raises:
            ValueError: The text is no endpoint.
        """
        shape = "write HOST:PORT, http://HOST:PORT, https://HOST:PORT or dns:///HOST:PORT"
        rest = text
        for scheme, uses_tls in (("http://", False), ("https://", True), ("dns:///", tls)):
            if text.startswith(scheme):
                rest, tls = text.removeprefix(scheme).removesuffix("/"), uses_tls
                break
        scheme, separator, _ = rest.partition("://")
        if separator or "@" in rest:
            raise ValueError(f"endpoint {text!r} has no form that is known; {shape}")
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) <= _PORT_MAX:
            raise ValueError(f"endpoint {text!r} has no port from 1 to {_PORT_MAX}; {shape}")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"endpoint {text!r} has an IPv6 address without brackets; {shape}")
        if not host or any(character in "/?#@ \t\r\n" for character in host):
            raise ValueError(f"endpoint {text!r} has no host; {shape}")
        return Endpoint(host, int(port), tls)

    async def resolve(self) -> list[Address]:
        """Looks the host name up.

        Raises:
            OSError: The name has no address.
        """
        try:
            return [Address(self, str(ipaddress.ip_address(self.host)), self.port)]
        except ValueError:
            pass
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        hosts = dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found)
        return [Address(self, host, self.port) for host in hosts]


@dataclass(frozen=True)
class ConnectOptions:
    """Endpoints of a client, and what it shows to them."""

    endpoints: tuple[Endpoint, ...]
    tls_ca: Path | None = None
    tls_client_cert: Path | None = None
    tls_client_key: Path | None = None
    token: str | None = None
    token_file: Path | None = None

    @staticmethod
    def checked(
        endpoints: str | Sequence[str],
        *,
        tls: bool | None,
        tls_ca: str | os.PathLike[str] | None,
        tls_client_cert: str | os.PathLike[str] | None,
        tls_client_key: str | os.PathLike[str] | None,
        token: str | None,
        token_file: str | os.PathLike[str] | None,
    ) -> ConnectOptions:
        """Checks the arguments, without reading a file or a name.

        Raises:
            ValueError: An endpoint is malformed, or arguments contradict each other.
        """
        if (tls_client_cert is None) != (tls_client_key is None):
            raise ValueError("tls_client_cert and tls_client_key are given together or not at all")
        if token is not None and not isinstance(token, str):
            raise TypeError(f"token is a {type(token).__name__}, not a str")
        if token is not None:
            _check_token(token)
        if token is not None and token_file is not None:
            raise ValueError("token and token_file cannot both be given")
        has_files = tls_ca is not None or tls_client_cert is not None
        texts = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if isinstance(endpoints, (bytes, bytearray)) or any(not isinstance(t, str) for t in texts):
            raise TypeError(f"endpoints={endpoints!r} are neither a str nor several")
        texts = [part.strip() for text in texts for part in text.split(",")]
        if not texts:
            raise ValueError("endpoints=[] names no worker")
        parsed = [Endpoint.parse(text, has_files if tls is None else tls) for text in texts]
        for text, endpoint in zip(texts, parsed, strict=True):
            if has_files and not endpoint.tls:
                raise ValueError(
                    f"endpoint {text!r} does not use TLS, so tls_ca and tls_client_cert have no "
                    "effect; write https://, or leave them out"
                )
            if tls is not None and tls != endpoint.tls:
                raise ValueError(f"endpoint {text!r} contradicts tls={tls}")
        return ConnectOptions(
            endpoints=tuple(dict.fromkeys(parsed)),
            tls_ca=None if tls_ca is None else Path(tls_ca),
            tls_client_cert=None if tls_client_cert is None else Path(tls_client_cert),
            tls_client_key=None if tls_client_key is None else Path(tls_client_key),
            token=token,
            token_file=None if token_file is None else Path(token_file),
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of every call: the bearer token, read anew so that a
        token that was replaced is used.

        Raises:
            ValueError: The token file has no token, or more than a token in its line.
            OSError: The token file cannot be read.
        """
        token = self.token
        if self.token_file is not None:
            # Some editors begin a file with a byte order mark.
            text = self.token_file.read_text(encoding="utf-8-sig")
            lines = (line.strip() for line in text.splitlines())
            token = next((line for line in lines if line and not line.startswith("#")), None)
            if token is None:
                raise ValueError(f"token_file {self.token_file} has no token")
            if len(token.split()) > 1:
                raise ValueError(
                    f"token_file {self.token_file}: the first line has several words, and a token "
                    "has no spaces; give a file with the token alone, not the auth_tokens_file of "
                    "the worker"
                )
        if token is None:
            return ()
        _check_token(token)
        return (("authorization", f"Bearer {token}"),)

    def channel(self, endpoint: Endpoint, address: Address | None = None) -> grpc.aio.Channel:
        """Opens a channel to an endpoint, whose addresses take turns, or to one
        address of it, with a connection of its own.

        Raises:
            OSError: A file of TLS cannot be read.
        """
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
            # The worker limits what it takes, and says so in words.
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", int(PING_INTERVAL * 1000)),
            ("grpc.keepalive_timeout_ms", int(PING_INTERVAL * 1000)),
            ("grpc.lb_policy_name", "round_robin"),
            # Retries are this package's own, which look at the worker's reasons.
            ("grpc.enable_retries", 0),
            # Calls go to the worker itself, as those of the command line do.
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5000),
        ]
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        target = f"dns:///{host}:{endpoint.port}"
        if address is not None:
            target = address.target
            options.append(("grpc.use_local_subchannel_pool", 1))
            options.append(("grpc.default_authority", f"{host}:{endpoint.port}"))
            if endpoint.tls:
                options.append(("grpc.ssl_target_name_override", endpoint.host))
        if not endpoint.tls:
            return grpc.aio.insecure_channel(target, options=options)

        def content(path: Path | None) -> bytes | None:
            return None if path is None else path.read_bytes()

        credentials = grpc.ssl_channel_credentials(
            root_certificates=content(self.tls_ca),
            private_key=content(self.tls_client_key),
            certificate_chain=content(self.tls_client_cert),
        )
        return grpc.aio.secure_channel(target, credentials, options=options)


def _check_token(token: str) -> None:
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError("the bearer token is not one line of printable ASCII characters")
