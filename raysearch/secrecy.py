"""Which variables of an environment are secrets, by their names and by what their values show. Pure.

It hides what a trial is handed, and walls nothing off: a program of the same user can read that user's files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

SECRET_CHARS = 8  # a shorter value is no key, and may stand in any text

_CONTAINED = ("SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
_ENDS = ("KEY", "KEYS", "TOKEN")  # of a word: MY_APIKEY too; TOKENS are what a program counts
_WORDS = ("AUTH", "BEARER", "COOKIE", "PAT")  # SSH_AUTH_SOCK is the way to the user's keys
_BEGINS = ("AWS_", "OPENCODE_CONFIG_CONTENT")  # the latter is a whole file, which may hold keys
_USERINFO = re.compile(r"://[^/?#\s@]+@")  # an address with a name or a password in it


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like a secret; rather one too many than one too few.

    So it is if, in capitals, its name contains SECRET, PASSWORD, PASSWD, PASSPHRASE or CREDENTIAL, or begins with AWS_;
    if a word of the name (between underscores) ends with KEY, KEYS or TOKEN, or is AUTH, BEARER, COOKIE or PAT, or is a
    PWD that is not the shell's own; or if the value holds an address with a user in it, `https://user:password@host`.
    """
    upper = name.upper()
    words = upper.split("_")
    return (
        any(part in upper for part in _CONTAINED)
        or upper.startswith(_BEGINS)
        or any(word.endswith(_ENDS) or word in _WORDS for word in words)
        or (words[-1] == "PWD" and len(words) > 1)
        or _USERINFO.search(value) is not None
    )


def without_secrets(environ: Mapping[str, str], named: Collection[str] = ()) -> dict[str, str]:
    """What of an environment may be seen by programs that nobody has read.

    Args:
        environ: All of it.
        named: Names of variables that are secrets whatever they look like.
    """
    return {name: value for name, value in environ.items() if name not in named and not is_secret(name, value)}
