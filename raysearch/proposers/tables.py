"""Tables of a configuration as the dataclasses that the proposers take: strictly, with one line for what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from raysearch.errors import UserError

T = TypeVar("T")


def check_keys(table: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    """Refuses a table with a key that nobody reads.

    Raises:
        UserError: It has one.
    """
    for key in table:
        if key not in known:
            raise UserError(f"{where}: the key {key!r} is not known; known: {', '.join(known)}; remove it")


def convert(table: Mapping[str, Any], kind: type[T], *, where: str) -> T:
    """Makes a dataclass of a table.

    Args:
        table: As TOML has it.
        kind: The dataclass; a table within it may be one too.
        where: For messages, such as `[[models]]`.

    Raises:
        UserError: A key that is not known, or a value of the wrong type.
    """
    check_keys(table, field_names(kind), where=where)
    try:
        return msgspec.convert(dict(table), kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}; correct the value") from None


def field_names(kind: type[Any]) -> list[str]:
    """Names of a dataclass's fields, in their order."""
    return [field.name for field in dataclasses.fields(kind)]
