"""What models cost, and the purse that keeps what is spent on them under a cap. It asks no model."""

from __future__ import annotations

import ipaddress
import re
import threading
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from raysearch.errors import UserError
from raysearch.proposers import SpentUp
from raysearch.wording import clean

_SNAPSHOT = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")
_ROUNDING_USD = 1e-9


@dataclass(frozen=True)
class Price:
    """Of a model, in USD per million tokens.

    Attributes:
        cached_input: Of a prompt's tokens that the server still had; None: as `input`.
        cache_write: Of a prompt's tokens that it put into its cache; None: as `input`.
    """

    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None

    def cost_usd(self, *, tokens_in: int, tokens_out: int, cached: int = 0, written: int = 0) -> float:
        """Of a call; `cached` and `written` are parts of `tokens_in`."""
        cached_input = self.input if self.cached_input is None else self.cached_input
        cache_write = self.input if self.cache_write is None else self.cache_write
        fresh = max(0, tokens_in - cached - written)
        total = fresh * self.input + cached * cached_input + written * cache_write + tokens_out * self.output
        return total / 1e6

    def worst_usd(self, *, tokens_in: int, tokens_out: int) -> float:
        """The most that a call of so many tokens can cost."""
        dearest = max(self.input, self.cached_input or 0.0, self.cache_write or 0.0)
        return (tokens_in * dearest + tokens_out * self.output) / 1e6


FREE = Price(0.0, 0.0)


def load_prices(override: Path | None = None) -> dict[str, Price]:
    """The prices that are known, by model.

    Args:
        override: A file of the user's, of the same form: its models are added, or replace those that come with us.

    Raises:
        UserError: The file cannot be read or is not of that form.
    """
    packaged = resources.files("raysearch.proposers").joinpath("prices.toml").read_text(encoding="utf-8")
    prices = _read(packaged, "prices.toml")
    if override is not None:
        try:
            prices |= _read(override.read_text(encoding="utf-8"), str(override))
        except (OSError, UnicodeDecodeError) as error:
            why = clean(str(error))
            raise UserError(f"price file {str(override)!r} cannot be read: {why}; --prices takes a TOML file") from None
    return prices


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    input: float
    output: float
    cached_input: float | None = None
    cache_write: float | None = None


def _read(text: str, name: str) -> dict[str, Price]:
    try:
        rows = msgspec.convert(tomllib.loads(text), dict[str, _Row])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UserError(
            f"price file {name!r}: {clean(str(error))}; a model is a table [name] with input, output and perhaps "
            "cached_input and cache_write in USD per million tokens"
        ) from None
    for model, row in rows.items():
        for key, value in msgspec.structs.asdict(row).items():
            if value is not None and not 0 <= value < 1e6:  # neither NaN
                raise UserError(f"price file {name!r}: {key} of {model!r} is {value}; it must be 0 or more USD")
    return {model: Price(row.input, row.output, row.cached_input, row.cache_write) for model, row in rows.items()}


def price_of(
    model: str, *, base_url: str | None, prices: Mapping[str, Price], capped: bool, note: Callable[[str], None]
) -> Price:
    """What a model costs, as far as that is known: a server in one's own network is free unless a price says else.

    Args:
        model: Its name, as the server knows it.
        base_url: Of the server; None for the API of the model's maker.
        prices: As `load_prices` gives them.
        capped: Whether there is a cap on spending, which a model without a price would pass unseen.
        note: Gets a line when the price is not known and counts as 0.

    Raises:
        UserError: The price is not known, and there is a cap.
    """
    price = prices.get(model) or prices.get(_SNAPSHOT.sub("", model))
    if price is not None:
        return price
    if is_local(base_url):
        return FREE
    remedy = f"add [{_toml_key(model)}] with input and output in USD per million tokens to a file for --prices"
    if capped:
        raise UserError(f"the price of model {model!r} is not known, so a spend cap cannot hold; {remedy}")
    note(f"the price of model {model!r} is not known, its cost counts as 0; {remedy}")
    return FREE


def _toml_key(model: str) -> str:
    return model if re.fullmatch(r"[A-Za-z0-9_-]+", model) else f'"{clean(model)}"'


def is_local(base_url: str | None) -> bool:
    """Whether a server is on this machine or in a private network, as far as its name or address says."""
    host = (urlsplit(base_url).hostname or "") if base_url else ""
    if not host:
        return False
    try:
        address: Any = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost"))
    return bool((address.is_private or address.is_loopback) and not address.is_unspecified)


class InUse(SpentUp):
    """What is left is set aside for calls in flight: there may be some when they have ended."""


class Purse:
    """What may be spent and what was, for any number of threads.

    The cap is hard: before a call the most that it can cost is set aside, afterwards what it did cost is counted.

    Attributes:
        limit_usd: The cap; None for none.
    """

    def __init__(self, limit_usd: float | None, spent_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self._spent = spent_usd
        self._reserved: list[float] = []  # of the calls in flight
        self._lock = threading.Lock()

    @property
    def spent_usd(self) -> float:
        """What was spent, without what is set aside."""
        with self._lock:
            return self._spent

    @property
    def at_most_usd(self) -> float:
        """What was spent at most: calls in flight count with all that is set aside for them."""
        with self._lock:
            return self._spent + sum(self._reserved)

    def count(self, usd: float) -> None:
        """Counts what was spent without being set aside: in an earlier session."""
        with self._lock:
            self._spent += usd

    def reserve(self, usd: float) -> None:
        """Sets the most that a call can cost aside; `settle` has to follow.

        Raises:
            SpentUp: The call could pass the cap.
            InUse: It could because of what is set aside for others.
        """
        with self._lock:
            held = sum(self._reserved)
            if self.limit_usd is not None and self._spent + held + usd > self.limit_usd + _ROUNDING_USD:
                others = f", ${held:.2f} set aside for calls in flight" if held else ""
                line = (
                    f"${self._spent:.2f} of ${self.limit_usd:.2f} spent{others}; the next call may cost ${usd:.2f}; "
                    "raise --max-usd"
                )
                fits_later = self._spent + usd <= self.limit_usd + _ROUNDING_USD
                raise InUse(line) if fits_later else SpentUp(line)
            self._reserved.append(usd)

    def settle(self, reserved_usd: float, actual_usd: float) -> None:
        """Counts what a call did cost, in place of what was set aside for it."""
        with self._lock:
            self._reserved.remove(reserved_usd)
            self._spent += actual_usd
