"""Scraping Prometheus endpoints: dcgm-exporter, vLLM, SGLang."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from flyball.core.errors import NotAccepted
from flyball.core.ports import Decoded

MAX_PAGE_BYTES = 32 << 20


async def scrape(
    client: httpx.AsyncClient, url: str, timeout_s: float, decode: Callable[[bytes], Decoded]
) -> Decoded:
    """One scrape. Raises: NotAccepted when the page cannot be had; nothing is kept of a page that was cut."""
    try:
        async with client.stream("GET", url, timeout=timeout_s, headers={"Accept": "text/plain"}) as response:
            if response.status_code != 200:
                raise NotAccepted(f"{url} answers {response.status_code}")
            page = bytearray()
            async for chunk in response.aiter_bytes():
                page += chunk
                if len(page) > MAX_PAGE_BYTES:
                    raise NotAccepted(
                        f"{url} sends more than {MAX_PAGE_BYTES >> 20} MiB; it is no metrics page"
                    )
    except httpx.HTTPError as e:
        raise NotAccepted(f"{url} cannot be scraped ({type(e).__name__})") from e
    return decode(bytes(page))
