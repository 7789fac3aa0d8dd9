"""How fast a server answers: the load, and what is measured of it. Works against any server with OpenAI's API.

Requests are sent at the times of a Poisson process (or all at once), whether earlier ones are answered or not: a client
that waits for answers would slow down with the server and hide that it is slow. Of each request:

    TTFT   first token - sending                      ITL    gaps between tokens
    E2E    last token - sending                       TPOT   (E2E - TTFT) / (tokens - 1)

A chunk of a stream may hold several tokens. Their number is read from the usage so far, where the server tells it
(`continuous_usage_stats`, vLLM's and ours), and a gap before k tokens counts as k gaps of a k-th, not as one gap and
k - 1 of nothing. Goodput is the rate of requests that kept to the limits given.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

__all__ = ["Load", "Measured", "arrivals", "bodies", "headline", "measure", "summary", "table"]

PERCENTILES = (50, 90, 95, 99)
WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@dataclass(frozen=True)
class Load:
    """What to send. See `raytron bench serve --help` for the fields, which are its flags."""

    url: str = "http://127.0.0.1:8000/v1"
    key: str | None = None
    model: str = ""
    endpoint: str = "completions"
    requests: int = 200
    rate: float = math.inf
    concurrency: int | None = None
    input_tokens: int = 128
    output_tokens: int = 64
    shared_tokens: int = 0
    vocabulary: int | None = None
    ignore_eos: bool = True
    warmup: int = 2
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """One request. Times in seconds after the first was due; arrivals are (time, tokens so far)."""

    due: float = 0.0
    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.arrivals[-1][0] - self.sent

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; NaN for a single one, or when all came at once."""
        after = self.tokens - self.arrivals[0][1]
        return (self.e2e - self.ttft) / after if after > 0 else math.nan

    def gaps(self) -> list[float]:
        """Seconds between tokens, one entry a token."""
        found: list[float] = []
        for (before, had), (now, has) in zip(self.arrivals, self.arrivals[1:], strict=False):
            found += [(now - before) / (has - had)] * (has - had) if has > had else []
        return found


async def measure(load: Load) -> list[Measured]:
    """Send the load and wait for all answers. Raises ValueError when not even the warm-up is answered."""
    asked, due = bodies(load), arrivals(load)
    limit = asyncio.Semaphore(load.concurrency or load.requests + load.warmup)
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, connect=60, sock_read=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:
        load_model = load.model or await _only_model(http, load)
        for body in asked:
            body["model"] = load_model
        warm = await asyncio.gather(*(_ask(http, load, body, 0.0, limit, 0.0) for body in asked[load.requests :]))
        if errors := [one.error for one in warm if one.error]:
            raise ValueError(f"{load.url}: {errors[0]}")
        begun = time.perf_counter()
        asking = (_ask(http, load, body, at, limit, begun) for body, at in zip(asked, due, strict=False))
        return list(await asyncio.gather(*asking))


async def _only_model(http: aiohttp.ClientSession, load: Load) -> str:
    try:
        async with http.get(f"{load.url}/models") as response:
            found = await response.json(content_type=None)
            return found["data"][0]["id"]
    except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{load.url} names no model ({error}); is it running? say which with --model") from error


def arrivals(load: Load) -> list[float]:
    """When requests are due, in seconds."""
    chance, now, due = random.Random(load.seed), 0.0, []
    for _ in range(load.requests):
        due.append(now)
        now += 0.0 if math.isinf(load.rate) else chance.expovariate(load.rate)
    return due


def bodies(load: Load) -> list[dict[str, Any]]:
    """A body for each request, and for the warm-up; prompts begin alike for `shared_tokens` and then differ."""
    chance, words = random.Random(load.seed + 1), WORDS.split()

    def draw(count: int) -> list[Any]:
        if load.vocabulary is not None:
            return [chance.randrange(load.vocabulary) for _ in range(count)]
        return [chance.choice(words) for _ in range(count)]

    shared, made = draw(load.shared_tokens), []
    for _ in range(load.requests + load.warmup):
        prompt: Any = [*shared, *draw(load.input_tokens - load.shared_tokens)]
        prompt = " ".join(prompt) if load.vocabulary is None else prompt
        chat = {"messages": [{"role": "user", "content": prompt}]}
        made.append((chat if load.endpoint == "chat" else {"prompt": prompt}) | _common(load))
    return made


def _common(load: Load) -> dict[str, Any]:
    told = {"include_usage": True, "continuous_usage_stats": True}
    common = {"max_tokens": load.output_tokens, "stream": True, "stream_options": told}
    return common | ({"ignore_eos": True} if load.ignore_eos else {}) | load.options


async def _ask(
    http: aiohttp.ClientSession, load: Load, body: dict[str, Any], due: float, limit: asyncio.Semaphore, begun: float
) -> Measured:
    """One request, sent when it is due."""
    path = {"completions": "completions", "chat": "chat/completions"}[load.endpoint]
    await asyncio.sleep(max(0.0, begun + due - time.perf_counter()) if begun else 0.0)
    found = Measured(due=due)
    async with limit:
        found.sent = time.perf_counter() - begun
        try:
            async with http.post(f"{load.url}/{path}", json=body) as response:
                if response.status != 200:
                    found.error = f"{response.status}: {(await response.text())[:200]}"
                    return found
                await _receive(response, found, begun)
        except (aiohttp.ClientError, TimeoutError) as error:
            found.error = f"{type(error).__name__}: {error}"
    if not found.tokens and found.error is None:
        found.error = "no token came"
    return found


async def _receive(response: aiohttp.ClientResponse, found: Measured, begun: float) -> None:
    tokens = 0
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        now, event = time.perf_counter() - begun, json.loads(line[6:])
        if "error" in event:
            found.error = str(event["error"])[:200]
            return
        if usage := event.get("usage"):
            found.prompt_tokens, tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if found.arrivals and not event["choices"]:  # the whole: right where chunks had to be counted
                found.arrivals[-1] = (found.arrivals[-1][0], tokens)
                continue
        elif any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event["choices"]):
            tokens += 1
        if tokens and (not found.arrivals or tokens > found.arrivals[-1][1]):
            found.arrivals.append((now, tokens))


def summary(
    load: Load, measured: Sequence[Measured], ttft_ms: float | None = None, tpot_ms: float | None = None
) -> dict[str, Any]:
    """The figures, JSON-ready. ttft_ms, tpot_ms: what a request has to keep to, to count as goodput."""
    good = [one for one in measured if one.error is None]
    seconds = max((one.arrivals[-1][0] for one in good), default=0.0)
    rates = {"requests": len(good), "output_tokens": sum(one.tokens for one in good)}
    rates["input_tokens"] = sum(one.prompt_tokens for one in good)
    found: dict[str, Any] = {
        "url": load.url,
        "rate": None if math.isinf(load.rate) else load.rate,
        "requests": len(measured),
        "failed": len(measured) - len(good),
        "errors": sorted({one.error for one in measured if one.error})[:5],
        "seconds": seconds,
        **{f"{name}_per_s": amount / seconds if seconds else 0.0 for name, amount in rates.items()},
        "ttft_ms": _spread([one.ttft for one in good]),
        "tpot_ms": _spread([one.tpot for one in good if not math.isnan(one.tpot)]),
        "itl_ms": _spread([gap for one in good for gap in one.gaps()]),
        "e2e_ms": _spread([one.e2e for one in good]),
        "late_ms": _spread([one.sent - one.due for one in good]),
    }
    if ttft_ms is not None or tpot_ms is not None:
        kept = sum(_kept(one, ttft_ms, tpot_ms) for one in good)
        found["goodput_requests_per_s"] = kept / seconds if seconds else 0.0
    return found


def _kept(one: Measured, ttft_ms: float | None, tpot_ms: float | None) -> bool:
    return (ttft_ms is None or one.ttft * 1e3 <= ttft_ms) and not (tpot_ms is not None and one.tpot * 1e3 > tpot_ms)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles, in milliseconds."""
    if not seconds:
        return {}
    ranked = sorted(seconds)
    return {"mean": sum(ranked) / len(ranked) * 1e3} | {f"p{p}": _percentile(ranked, p) * 1e3 for p in PERCENTILES}


def _percentile(ranked: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    at = (len(ranked) - 1) * percent / 100
    low = math.floor(at)
    return ranked[low] + (ranked[min(low + 1, len(ranked) - 1)] - ranked[low]) * (at - low)


def table(found: dict[str, Any]) -> Any:
    """The times as a rich table."""
    from rich.table import Table

    rows = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}
    shown = Table("ms", "mean", *(f"p{p}" for p in PERCENTILES), box=None, header_style="bold")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, key in rows.items():
        shown.add_row(name, *(f"{value:,.2f}" for value in found[key].values()))
    return shown


def headline(found: dict[str, Any]) -> str:
    """What the table leaves out, in a sentence."""
    goodput = found.get("goodput_requests_per_s")
    return (
        f"{found['requests'] - found['failed']} requests in {found['seconds']:.1f} s, {found['failed']} failed; "
        f"{found['requests_per_s']:.2f} requests/s, {found['output_tokens_per_s']:,.0f} output tokens/s"
        + ("" if goodput is None else f", goodput {goodput:.2f} requests/s")
    )
