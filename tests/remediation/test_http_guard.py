"""Addresses that people configure never lead to the inside of the network."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.errors import ConfigError, NotAccepted
from flyball.remediation.http_guard import (
    AddressRefused,
    Allowed,
    GuardedTransport,
    SystemResolver,
    check_url,
    guarded_client,
)
from tests.remediation._receiver import Answer, receiver

PUBLIC = "93.184.216.34"
NOTHING = Allowed()


class Names:
    """A resolver that answers from lists, the next one at each question; the last stays."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {k.replace("_", "."): list(v) for k, v in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise NotAccepted(f"the name {host!r} could not be resolved; nothing was sent")
        left = self.answers[host]
        return left.pop(0) if len(left) > 1 else left[0]


class Wire(httpx.AsyncBaseTransport):
    """Keeps what would have gone out; addresses in `dead` do not answer."""

    def __init__(self, dead: Sequence[str] = ()) -> None:
        self.sent: list[httpx.Request] = []
        self.dead = dead

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host in self.dead:
            raise httpx.ConnectError("no route")
        self.sent.append(request)
        return httpx.Response(200)


def post(url: str, names: Names, allowed: Allowed = NOTHING, wire: Wire | None = None) -> Wire:
    wire = wire or Wire()

    async def main() -> None:
        async with httpx.AsyncClient(
            transport=GuardedTransport(wire, names, allowed), trust_env=False
        ) as client:
            await client.post(url, content=b"x")

    asyncio.run(main())
    return wire


def test_a_public_name_is_pinned_to_the_address_that_was_judged() -> None:
    names = Names(hooks_example=[[PUBLIC], ["127.0.0.1"]])
    (request,) = post("https://hooks.example:8443/a?b=c", names).sent
    assert str(request.url) == f"https://{PUBLIC}:8443/a?b=c"
    assert request.headers["host"] == "hooks.example:8443"
    assert request.extensions["sni_hostname"] == "hooks.example"
    assert names.asked == ["hooks.example"], "asked once: the second answer would have led inside"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "2002:7f00:1::", "2002:a9fe:a9fe::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "fe80::1%eth0",
        "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_of_the_inside_are_refused(address: str) -> None:
    wire = Wire()
    with pytest.raises(AddressRefused):
        post("http://hooks.example/", Names(hooks_example=[[address]]), wire=wire)
    assert wire.sent == []


def test_one_bad_address_among_good_ones_refuses_the_name() -> None:
    with pytest.raises(AddressRefused):
        post("http://hooks.example/", Names(hooks_example=[[PUBLIC, "10.0.0.1"]]))


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:7f00:1]", "169.254.169.254"])
def test_a_written_out_address_is_judged_like_a_resolved_one(host: str) -> None:
    names = Names()
    with pytest.raises(AddressRefused):
        post(f"http://{host}/", names)
    assert names.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "localhost"])
def test_odd_spellings_of_loopback_are_judged_by_where_they_lead(host: str) -> None:
    async def main() -> None:
        async with guarded_client(NOTHING) as client:
            await client.post(f"http://{host}/", content=b"x")

    with pytest.raises((AddressRefused, NotAccepted, httpx.InvalidURL)):
        asyncio.run(main())


def test_a_private_network_or_name_is_reached_when_it_is_allowed() -> None:
    names = Names(am_internal=[["10.1.2.3"]])
    assert post("http://am.internal/", names, Allowed.of(["10.0.0.0/8"])).sent
    assert post("http://AM.internal./", Names(am_internal=[["10.1.2.3"]], am_internal_=[["10.1.2.3"]]),
                Allowed.of(hosts=["am.internal"])).sent  # fmt: skip
    with pytest.raises(AddressRefused, match=r"egress\.networks"):
        post("http://am.internal/", names, Allowed.of(["192.168.0.0/16"], ["other.internal"]))


def test_allowing_a_name_does_not_open_where_clouds_keep_credentials() -> None:
    names = Names(am_internal=[["169.254.169.254"]])
    with pytest.raises(AddressRefused, match="link-local"):
        post("http://am.internal/", names, Allowed.of(hosts=["am.internal"]))
    assert post("http://am.internal/", names, Allowed.of(["169.254.0.0/16"])).sent


def test_the_next_address_is_tried_when_one_cannot_be_reached() -> None:
    names = Names(hooks_example=[["2606:2800:220:1::1", PUBLIC]])
    wire = post("http://hooks.example/", names, wire=Wire(dead=["2606:2800:220:1::1"]))
    assert [r.url.host for r in wire.sent] == [PUBLIC]
    with pytest.raises(httpx.ConnectError):
        post("http://hooks.example/", names, wire=Wire(dead=["2606:2800:220:1::1", PUBLIC]))


def test_a_name_without_an_address_is_not_sent_to() -> None:
    with pytest.raises(NotAccepted):
        post("http://hooks.example/", Names(hooks_example=[[]]))
    with pytest.raises(NotAccepted):
        post("http://unknown.example/", Names())
    with pytest.raises(NotAccepted):
        asyncio.run(SystemResolver().resolve("no-such-name.invalid", 80))


def test_redirects_to_the_inside_are_not_followed() -> None:
    async def main() -> None:
        async with (
            receiver(Answer(302, headers={"location": "http://169.254.169.254/latest"})) as box,
            guarded_client(Allowed.of(["127.0.0.0/8"])) as client,
        ):
            response = await client.post(box.url, content=b"x")
            assert response.status_code == 302
            assert len(box.requests) == 1
            # Also a caller that follows them gets no further than the guard.
            box.answers.append(Answer(302, headers={"location": "http://169.254.169.254/latest"}))
            with pytest.raises(AddressRefused):
                await client.post(box.url, content=b"x", follow_redirects=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("gopher://x/", "only http and https"),
        ("https:///path", "only http and https"),
        ("http://x:99999/", "is no address"),
        ("http://[::1/", "is no address"),
        ("http://127.0.0.1/SECRET", "a loopback address"),
        ("http://localhost/SECRET", "a loopback address"),
        ("http://10.0.0.1/SECRET", "a private address"),
    ],
)
def test_what_is_wrong_about_an_address_is_said_when_settings_are_read(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_url(url, NOTHING, where="channels[0].url")
    assert "SECRET" not in str(caught.value)
    assert caught.value.where == "channels[0].url"


def test_a_public_address_passes_when_settings_are_read() -> None:
    check_url("https://hooks.example/x", NOTHING)
    check_url("http://10.0.0.1/x", Allowed.of(["10.0.0.0/8"]))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_the_same_in_every_disguise(address: object) -> None:
    import ipaddress

    assert isinstance(address, ipaddress.IPv4Address)
    plain = NOTHING.refusal("h", address)
    mapped = ipaddress.IPv6Address(f"::ffff:{address}")
    nat64 = ipaddress.IPv6Address((0x64FF9B << 96) | int(address))
    assert bool(NOTHING.refusal("h", mapped)) == bool(plain)
    assert bool(NOTHING.refusal("h", nat64)) == bool(plain)
