"""Keeps requests to configured addresses away from the inside of the network (SSRF).

Addresses of hooks and webhooks are written by people, some of them not the ones who run Flyball. Without a guard such an
address could be `http://169.254.169.254/…` or the admin port next door, and Flyball, which sits inside, would post to it.
The guard stands at the transport, below everything that could rewrite an address: it resolves the name itself, judges every
address the name has, and connects to the very address it judged, so that a name cannot change its meaning in between.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Protocol
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator

from flyball.core.errors import ConfigError, Failed, NotAccepted

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = ip_network("64:ff9b::/96")
_NAT64_LOCAL = ip_network("64:ff9b:1::/48")
_LINK_LOCAL = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"), ip_network("fd00:ec2::254/128"))
"""Where clouds keep the credentials of a machine: never reached by allowing a name, only by allowing the network itself."""


_ADDRESSES_TRIED = 3


class AddressRefused(Failed):
    """The address is not one that Flyball may reach. Nothing was sent, and nothing will be until a setting changes."""


class Resolver(Protocol):
    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host. Raises: NotAccepted when it has none or cannot be asked."""
        ...


class SystemResolver:
    """Asks the operating system."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            raise NotAccepted(f"the name {host!r} could not be resolved; nothing was sent") from e
        return [str(info[4][0]) for info in found]


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be reached beside the public internet.

    networks: addresses that may be reached under any name, e.g. `10.0.0.0/8`.
    hosts: names that may point to private or loopback addresses (not to link-local ones), e.g. `alertmanager.monitoring.svc`.
    """

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, networks: Sequence[str] = (), hosts: Sequence[str] = ()) -> Allowed:
        """Raises: ConfigError for what is no network."""
        parsed = []
        for text in networks:
            try:
                parsed.append(ip_network(text, strict=False))
            except ValueError as e:
                raise ConfigError(
                    f"{text!r} is no network; write it like 10.0.0.0/8 or fd00::/8", where="egress.networks"
                ) from e
        return cls(tuple(parsed), frozenset(_name(h) for h in hosts))

    def refusal(self, host: str, address: Address) -> str:
        """Why this address of `host` may not be reached; empty when it may."""
        for one in _meant(address):
            if any(one in n for n in self.networks if n.version == one.version):
                continue
            if any(one in n for n in _LINK_LOCAL if n.version == one.version):
                return f"{host} is {one}, a link-local address"
            if _public(one) or _name(host) in self.hosts:
                continue
            kind = "a loopback" if one.is_loopback else "a private" if one.is_private else "not a public"
            return (
                f"{host} is {one}, {kind} address; allow it by egress.networks or egress.hosts if it is meant"
            )
        return ""


def _name(host: str) -> str:
    return host.rstrip(".").lower()


def _public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


def _meant(address: Address) -> list[Address]:
    """The address, and the IPv4 address it carries inside (mapped, 6to4, Teredo, NAT64), which is where it would lead."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner = [a for a in (address.sixtofour, *(address.teredo or ())) if a is not None]
    if address in _NAT64 or address in _NAT64_LOCAL:
        # NAT64's own prefix is not "global" for Python, but leads wherever the last 32 bits say.
        return [IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address, *inner]


def check_url(url: str, allowed: Allowed, where: str = "") -> None:
    """What can be said about an address before any name is resolved: for the moment when settings are read.

    Raises: ConfigError. The text never holds the path, which is a secret in some webhooks.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as e:
        raise ConfigError("is no address; write https://host/path", where=where) from e
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            f"{parts.scheme or 'no scheme'!s}: only http and https go; write https://host/path", where=where
        )
    try:
        address = ip_address(host)
    except ValueError:
        if _name(host) == "localhost" or _name(host).endswith(".localhost"):
            address = ip_address("127.0.0.1")
        else:
            return
    if why := allowed.refusal(host, address):
        raise ConfigError(why, where=where)


def _http_url(value: str) -> str:
    try:
        check_url(value, _ANYWHERE)
    except ConfigError as e:
        raise ValueError(e.what) from e
    return value


_ANYWHERE = Allowed.of(["0.0.0.0/0", "::/0"])
HttpUrl = Annotated[str, AfterValidator(_http_url)]
"""A setting that holds an http(s) address. Whether it may be reached is judged when it is, by the guard."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """Refuses requests to where Flyball must not go, and pins the rest to the address that was judged.

    The name stays in the Host header and in the TLS handshake, so certificates are verified against it. All addresses of
    a name must be allowed: with a mixed answer, which one is used would be the name server's choice.
    The inner transport must not keep connections alive: its pool knows them by address only and would use one that was
    verified for another name (`guarded_client` sees to that).
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, resolver: Resolver, allowed: Allowed) -> None:
        self._inner, self._resolver, self._allowed = inner, resolver, allowed

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise AddressRefused(f"{url.scheme} addresses are not used; only http and https are")
        host = url.host
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._judged(host, port)
        failure: httpx.TransportError | None = None
        for address in addresses[:_ADDRESSES_TRIED]:
            extensions = dict(request.extensions)
            if str(address) != host:
                extensions["sni_hostname"] = host
            pinned = httpx.Request(
                request.method,
                url.copy_with(host=str(address)),
                headers=request.headers,
                stream=request.stream,
                extensions=extensions,
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as e:
                # Nothing was sent yet: a host with IPv6 and IPv4 may be reachable by the other one.
                failure = e
        raise failure or NotAccepted(f"the name {host!r} has no address; nothing was sent")

    async def _judged(self, host: str, port: int) -> list[Address]:
        try:
            addresses: list[Address] = [ip_address(host)]
        except ValueError:
            # A zone ("fe80::1%eth0") only ever belongs to link-local addresses; it is dropped for judging.
            found = await self._resolver.resolve(host, port)
            addresses = [ip_address(text.split("%")[0]) for text in found]
        for address in addresses:
            if why := self._allowed.refusal(host, address):
                raise AddressRefused(f"not sent: {why}")
        return list(dict.fromkeys(addresses))

    async def aclose(self) -> None:
        await self._inner.aclose()


def guarded_client(
    allowed: Allowed, *, timeout_s: float = 15.0, resolver: Resolver | None = None
) -> httpx.AsyncClient:
    """A client for addresses that people configure: guarded, no redirects, no proxy or credentials from the environment."""
    inner = httpx.AsyncHTTPTransport(
        limits=httpx.Limits(max_connections=32, max_keepalive_connections=0), trust_env=False, retries=0
    )
    return httpx.AsyncClient(
        transport=GuardedTransport(inner, resolver or SystemResolver(), allowed),
        timeout=httpx.Timeout(timeout_s, connect=min(5.0, timeout_s)),
        follow_redirects=False,
        trust_env=False,
    )
