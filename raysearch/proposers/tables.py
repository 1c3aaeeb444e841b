"""Tables of a configuration as the dataclasses that the proposers take: strictly, with one line for what is wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar, get_type_hints

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
        raise UserError(f"{where}: {_told(str(error), table, kind)}; correct it") from None


def _told(error: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """What is wrong, with the key, its value and, of words, those that are known."""
    rule, _, place = error.partition(" - at `$.")
    key = re.match(r"\w*", place)
    if not key or key[0] not in table:
        return error
    wanted: Any = get_type_hints(kind)[key[0]]
    words = [member.value for member in wanted] if isinstance(wanted, type) and issubclass(wanted, Enum) else []
    known = f"; known: {', '.join(map(str, words))}" if words else ""
    return f"{key[0]} = {table[key[0]]!r}: {rule[0].lower()}{rule[1:]}{known}"


def field_names(kind: type[Any]) -> list[str]:
    """Names of a dataclass's fields, in their order."""
    return [field.name for field in dataclasses.fields(kind)]
