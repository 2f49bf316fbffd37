"""What is not ours: the libraries are those that their notes name, unchanged."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import relay

STATIC = Path(relay.__file__).parent / "page" / "static"
AXE = Path(__file__).parents[1] / "support" / "axe"


@pytest.mark.parametrize(("folder", "name"), [(STATIC, "uplot.js"), (STATIC, "uplot.css"), (AXE, "axe.min.js")])
def test_a_library_is_the_one_that_its_note_names(folder: Path, name: str) -> None:
    """The digest beside it is the file's, and its licence is there."""
    note = (folder / "README.txt").read_text()
    found = re.search(rf"sha256 of {re.escape(name)} +([0-9a-f]{{64}})", note)
    assert found is not None
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == found[1]
    assert any("LICENSE" in file.name for file in folder.iterdir())
