"""The page behind a proxy with TLS, as docs/page.md has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import documents
from support.certificates import Certificate

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="no nginx")
def test_nginx_takes_the_proxy_of_the_page(tmp_path: Path) -> None:
    """Its configuration has no fault, but for the names of the certificate."""
    (block,) = (b for b in documents.blocks() if (b.page, b.language) == ("page.md", "nginx"))
    certificate = Certificate(tmp_path)
    text = block.text.replace("/etc/ssl/certs/smtp-dup.example.com.pem", str(certificate.certificate))
    text = text.replace("/etc/ssl/private/smtp-dup.example.com.key", str(certificate.key))
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {folders}\n{text}}}\n")
    assert NGINX
    done = subprocess.run([NGINX, "-t", "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
