"""The files of the human's directions in a study's folder: written at its start, and read again while it runs.

What a text means is said by `directions`, and what is in force by the journal. Nothing here is decided for a proposer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from raysearch.directions import GENERAL, check, file_for
from raysearch.errors import UserError


def general() -> str:
    """The directions of a study for which nobody wrote any."""
    return resources.files("raysearch").joinpath(GENERAL).read_text(encoding="utf-8")


def read(path: Path) -> str | None:
    """The text of a file; None where it is not there.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; directions must be a text file in UTF-8") from None


def given(path: Path) -> str:
    """The text of a file that the user named, seen to be valid.

    Raises:
        UserError: It is not there, cannot be read, or is not valid.
    """
    text = read(path)
    if text is None:
        raise UserError(f"{path}: there is no such file; --program takes a text file with directions")
    check({str(path): text})
    return text


def put(path: Path, text: str) -> None:
    """Writes a file in one piece."""
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Programs:
    """The files of one study.

    Args:
        folder: Of the study.
        presets: Those that there may be a file for.
    """

    def __init__(self, folder: Path, presets: Iterable[str]) -> None:
        self._paths = {name: folder / name for name in (GENERAL, *map(file_for, presets))}
        self._refused: dict[str, str] = {}  # what was complained about, by file

    def begin(self, known: Mapping[str, str]) -> dict[str, str]:
        """What has changed between two sessions; a file that is gone is written again as it was.

        Args:
            known: Texts that are in force, by file.

        Raises:
            UserError: A file is not valid, or two contradict one another.
        """
        texts: dict[str, str] = {}
        for name, path in self._paths.items():
            text = read(path)
            if text is None and name in known:
                put(path, known[name])
                text = known[name]
            if text is not None:
                texts[name] = text
        check(texts)
        return {name: text for name, text in texts.items() if known.get(name) != text}

    def add(self, preset: str, text: str | None) -> None:
        """Writes the file of a preset, if there is none and the preset has something to say."""
        path = self._paths[file_for(preset)]
        if text is not None and not path.exists():
            put(path, text)

    def news(self, known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """What has changed and is valid, and a line on each version of a file that is not.

        Args:
            known: Texts that are in force, by file.
        """
        found: dict[str, str] = {}
        notes: list[str | None] = []
        for name, path in self._paths.items():
            try:
                text = read(path)
            except UserError as error:
                notes.append(self._note(name, str(error), str(error)))
                continue
            if text is None and name in known:
                notes.append(self._note(name, "", f"{name} is gone; empty it to take back what it says"))
            elif text == known.get(name):
                self._refused.pop(name, None)
            elif text is not None:
                found[name] = text
        taken: dict[str, str] = {}
        for batch in (found, *({name: text} for name, text in found.items())):  # two may be valid only together
            try:
                check({**known, **taken, **batch})
            except UserError as error:
                notes += [self._note(name, text, str(error)) for name, text in batch.items() if len(batch) == 1]
            else:
                taken |= batch
                if batch is found:
                    break
        return taken, [note for note in notes if note is not None]

    def _note(self, name: str, version: str, reason: str) -> str | None:
        """A complaint, once for each version of a file."""
        if self._refused.get(name) == version:
            return None
        self._refused[name] = version
        return f"{reason}; until then the directions stay as they are"
