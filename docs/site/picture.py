"""docs/demo.svg: what `smtp-dup demo` shows in a terminal, from a real run.

`python docs/site/picture.py` runs the demo in a terminal of its own, ends it with Ctrl-C as soon as it has shown
everything, and draws the last state of its table. Fonts are the reader's: the picture fetches nothing.
"""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

_COLUMNS = 112
_COMMAND = "smtp-dup demo"
_END = "All of it keeps running"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]|\r")  # all but colours


def watch() -> str:
    """Run the demo in a terminal; return what it wrote until all was shown."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"COLUMNS": str(_COLUMNS), "TERM": "xterm-256color"}
        os.execv(sys.executable, [sys.executable, "-m", "relay.command", "demo"])  # noqa: S606 - our own program
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, _COLUMNS, 0, 0))
    written = b""
    try:
        while _END.encode() not in written:
            written += os.read(terminal, 65536)
        os.kill(process, signal.SIGINT)
        while os.read(terminal, 65536):
            pass
    except OSError:  # the terminal's end
        pass
    os.waitpid(process, 0)
    return written.decode("utf-8", "replace")


def draw(written: str) -> str:
    """Return the picture of the last table in what was written."""
    text = _CONTROL.sub("", written.partition(_END)[0])
    table = text[text.rindex("┏") :].rstrip()
    table = "\n".join(line for line in table.splitlines() if re.search(r"[┏┃┡│└├]", line))
    # Neighbours of different colours have places of their own, whatever the widths of the reader's font are.
    table = re.sub(r"[━─]+", "\x1b[90m\\g<0>\x1b[39m", table)
    table = re.sub(r"[┏┃┡│└├┳┻╇┴┬┓┩┘]", "\x1b[38;5;8m\\g<0>\x1b[39m", table)
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"\x1b[1m$ {_COMMAND}\x1b[0m\n\x1b[0m{table}\x1b[0m"))
    own = re.sub(r"@font-face \{\{.*?\n    \}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    own = own.replace("Fira Code, monospace", "monospace")
    picture = console.export_svg(title="smtp-dup", code_format=own, unique_id="demo")
    return re.sub(r"\s*<!-- Generated.*?-->", "", picture)


def main() -> None:
    """Write the picture."""
    path = Path(__file__).parents[1] / "demo.svg"
    path.write_text(draw(watch()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
