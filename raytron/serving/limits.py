"""Who asks, and how much they may: keys compared in constant time, and token buckets.

A bucket of r a minute holds at most r and fills evenly. Whoever finds a request's worth in it, or any token, is let in
and takes what they use, below zero if need be: an answer larger than the bucket can be given, once, and is paid off by
waiting. Tokens of an answer are taken when they are known, which is when it ends.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raytron.config import ServeConfig
from raytron.serving.protocol import Refused

__all__ = ["Bucket", "Caller", "Limits", "caller_of"]

MOST_CALLERS = 10_000  # remembered; the one that asked longest ago is forgotten first


@dataclass(frozen=True)
class Caller:
    """Who asks: `id` is a key's number or an address, never the key. `admin` holds the admin key."""

    id: str
    admin: bool = False


def caller_of(config: ServeConfig, headers: Mapping[bytes, bytes], address: str, path: str) -> Caller:
    """Who sent these headers. Raises Refused (401, 403) where they may not ask for `path`.

    The key is a Bearer token or, for browsers, which can't send one when they open a page, the password of Basic
    authorisation; /admin takes only the former, so that no other page can make a browser use it.
    """
    if path == "/health":
        return Caller(address)
    given, basic = _key(headers.get(b"authorization", b""))
    admin = config.admin_key is not None and _same(given, config.admin_key)
    # Every key is compared, whichever fits, so that the time taken tells nothing.
    fits = [number for number, key in enumerate(config.api_keys) if _same(given, key)]
    if path.startswith("/admin"):
        _check_admin(config, admin, basic, headers)
        return Caller("admin", admin=True)
    if config.api_keys and not fits and not admin:
        wrong = "the API key is wrong" if given else "an API key is needed: send the header Authorization: Bearer KEY"
        challenge = 'Basic realm="raytron: the password is the API key"' if path == "/" else "Bearer"
        raise Refused(wrong, status=401, code="invalid_api_key", headers={"WWW-Authenticate": challenge})
    return Caller("admin", admin=True) if admin else Caller(f"key {fits[0]}" if fits else address)


def _check_admin(config: ServeConfig, admin: bool, basic: bool, headers: Mapping[bytes, bytes]) -> None:
    if config.admin_key is not None:
        if not admin or basic:
            raise Refused("the admin key is needed", status=401, code="invalid_api_key")
    elif config.api_keys:
        raise Refused("there is no admin key, so nobody may; start the server with one", status=403)
    elif b"origin" in headers:
        raise Refused("a web page may not do this without an admin key", status=403)


def _key(authorization: bytes) -> tuple[bytes, bool]:
    """(the key in the header or nothing, whether it came as Basic)."""
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip(), False
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2], True
        except binascii.Error:
            return b"", True
    return b"", False


def _same(given: bytes, key: str) -> bool:
    return hmac.compare_digest(given, key.encode())


class Bucket:
    """`rate` a minute; who comes must find `least` in it. `clock` gives seconds."""

    def __init__(self, rate: float, least: float = 1e-9, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.least, self.clock = rate, min(least, rate), clock
        self.level, self._seen = rate, clock()

    def wait_s(self) -> float:
        """Seconds until something may be taken: 0 is now."""
        now = self.clock()
        self.level = min(self.rate, self.level + (now - self._seen) * self.rate / 60)
        self._seen = now
        return max(0.0, (self.least - self.level) * 60 / self.rate)

    def take(self, amount: float) -> None:
        """Take so much, whether it is there or not."""
        self.level -= amount


class Limits:
    """The buckets of everyone who has asked lately."""

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = {"requests": config.requests_per_minute, "tokens": config.tokens_per_minute}
        self._rates = {name: rate for name, rate in self._rates.items() if rate is not None}
        self._clock = clock
        self._buckets: OrderedDict[str, dict[str, Bucket]] = OrderedDict()

    def admit(self, caller: Caller) -> None:
        """Count a request. Raises Refused (429, with Retry-After) when it is too early for another."""
        if not self._rates or caller.admin:
            return
        buckets = self._of(caller)
        name, wait = max(((name, bucket.wait_s()) for name, bucket in buckets.items()), key=lambda pair: pair[1])
        if wait > 0:
            raise Refused(
                f"more than {self._rates[name]:g} {name} a minute; try again in {wait:.1f} s",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(max(1, -int(-wait // 1)))},
            )
        if "requests" in buckets:
            buckets["requests"].take(1)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Count the tokens of an answer."""
        if "tokens" in self._rates and not caller.admin:
            self._of(caller)["tokens"].take(tokens)

    def _of(self, caller: Caller) -> dict[str, Bucket]:
        buckets = self._buckets.pop(caller.id, None)
        least = {"requests": 1.0, "tokens": 1e-9}
        buckets = buckets or {name: Bucket(rate, least[name], self._clock) for name, rate in self._rates.items()}
        self._buckets[caller.id] = buckets
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        return buckets
