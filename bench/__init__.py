"""Benchmarks of smtp-dup against what a mail admin would use instead: ``python -m bench``.

They run on the real servers that the tests run on, so tests/, with its package ``support``, is on the path here too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TESTS = ROOT / "tests"

for _folder in (str(ROOT), str(_TESTS)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)
