"""What is wrong with the settings: every problem with its place, never a secret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relay.config.options import ENV_PREFIX


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: the key (or variable, or field), its place, and what was expected."""

    key: str
    where: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)

    @property
    def in_file(self) -> bool:
        """Whether it stands in a settings file, and not in a flag or a variable."""
        return bool(self.where) and not self.where.startswith(("-", ENV_PREFIX, "environment"))


class SettingsError(Exception):
    """The settings cannot be used; ``problems`` holds all reasons, one line each.

    ``state_dir`` is the state folder as far as the settings could be read, None where nothing was.
    """

    def __init__(self, problems: Sequence[Problem], state_dir: Path | None = None) -> None:
        self.problems = list(problems)
        self.state_dir = state_dir
        super().__init__("\n".join(map(str, self.problems)))
