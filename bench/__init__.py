"""Benchmarks of smtp-dup against what a mail admin would use instead: ``python -m bench``.

They run on the real servers that the tests run on, so tests/support is on the path here too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SUPPORT = ROOT / "tests" / "support"

for _folder in (str(ROOT), str(_SUPPORT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)
