"""The exported map of who has moved is what Postfix, Dovecot and nginx read: the real programs look each address up."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.cockpit import moved_exports
from relay.mail.destination import Destination
from relay.topology.moved import MovedEntry
from support import documents
from support.waiting import free_port, wait_until

SERVERS = {
    "new": Destination("new", "new.example.com", 25),
    "six": Destination("six", "2001:db8::1", 2525),
    "pin": Destination("pin", "192.0.2.7", 24, scheme="lmtp"),
}
MAP = (
    ("anna@a.example", "new"), ("bert+tag@a.example", "six"), ("carl@a.example", "pin"), ("@b.example", "new"),
    ("@.c.example", "six"), ("~tilde@a.example", "new"), ("o'neil@a.example", "new"), ("a.b-c_d@a.example", "new"),
    ("$x{y}@a.example", "new"), ("quoted x@a.example", "new"), ('in"side@a.example', "new"), ("#hash@a.example", "new"),
    ("back\\slash@a.example", "new"), ("co:lon@a.example", "new"), ("d\u00f6ra@xn--bcher-kva.example", "new"),
    ("gone@a.example", "unknown"), ("semi;colon@a.example", "new"),
)  # fmt: skip
ENTRIES = [(key, MovedEntry(server, 5.0, "me", 'a "note", of mine')) for key, server in MAP]


def exported(form: str, **hosts: str) -> str:
    return "\n".join(moved_exports.lines(form, ENTRIES, SERVERS, hosts)) + "\n"


def left_out(text: str) -> set[str]:
    return set(re.findall(r"(?m)^# left out: (.*?): [^:]*$", text))


@pytest.mark.skipif(shutil.which("postmap") is None, reason="needs Postfix's postmap")
def test_postfix_looks_up_what_was_exported(tmp_path: Path) -> None:
    """postmap -q finds each key that such a file can hold, with the transport; the others are comments."""
    text = exported("postfix")
    table = tmp_path / "moved"
    table.write_text(text)
    (tmp_path / "main.cf").write_text("compatibility_level = 3.6\n")

    def query(key: str) -> str:
        command = ["postmap", "-c", str(tmp_path), "-q", key, f"texthash:{table}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "warning" not in done.stderr, done.stderr
        return done.stdout.strip()

    transports = {
        "new": "smtp:[new.example.com]:25",
        "six": "smtp:[2001:db8::1]:2525",
        "pin": "lmtp:inet:[192.0.2.7]:24",
    }
    none = left_out(text)
    assert none == {
        "quoted x@a.example",
        'in"side@a.example',
        "#hash@a.example",
        "back\\slash@a.example",
        "gone@a.example",
    }
    for key, server in MAP:
        if key not in none:
            assert query(key.removeprefix("@")) == transports[server], key
    assert query("a.example") == query("otto@a.example") == ""


PAGE = "migration.md"


def piece(name: str) -> str:
    """Return a block of the page that is a configuration of this program."""
    return documents.pieces(PAGE, name)[f"{name}.conf"]


def dovecot_missing() -> str:
    if os.geteuid() != 0 or shutil.which("doveadm") is None:
        return "needs root and Dovecot's doveadm"
    version = subprocess.run(["dovecot", "--version"], capture_output=True, text=True, check=True).stdout
    return "" if version.startswith("2.3.") else f"needs Dovecot 2.3, this is {version.strip()}"


@pytest.fixture
def dovecot() -> Iterator[Path]:
    """The folder of a Dovecot that answers what its passdbs say, as the page has them."""
    if reason := dovecot_missing():
        pytest.skip(reason)
    # Not below pytest's folder: its processes run as users of their own, and must be able to enter.
    folder = Path(tempfile.mkdtemp(prefix="smtp-dup-passdb-"))
    folder.chmod(0o755)
    text = exported("dovecot", new="imap.new.example.com")
    (folder / "moved").write_text(text)
    (folder / "dovecot.conf").write_text(
        f"base_dir = {folder}/run\nstate_dir = {folder}/state\ninstance_name = {folder.name}\n"
        f"log_path = {folder}/log\nprotocols =\nssl = no\nauth_username_chars =\n"
        + piece("dovecot").replace("/etc/dovecot/", f"{folder}/")
    )
    started = subprocess.Popen(["dovecot", "-F", "-c", str(folder / "dovecot.conf")])
    try:
        wait_until((folder / "run" / "auth-client").exists, message=(folder / "log").read_text)
        yield folder
    finally:
        started.terminate()
        started.wait(20)
        shutil.rmtree(folder)


def test_dovecot_proxies_by_what_was_exported(dovecot: Path) -> None:
    """Who has moved, or whose domain has, is proxied to the new server's host; everybody else to the old one's."""

    def host(user: str) -> str:
        command = ["doveadm", "-c", str(dovecot / "dovecot.conf"), "auth", "test", user, "any password"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"(?m)^\s*host=(\S+)", done.stdout)
        assert "auth succeeded" in done.stdout, done.stdout + done.stderr + (dovecot / "log").read_text()
        assert re.search(r"(?m)^\s*proxy", done.stdout), done.stdout
        return found[1] if found else ""

    hosts = {"new": "imap.new.example.com", "six": "2001:db8::1", "pin": "192.0.2.7"}
    none = left_out((dovecot / "moved").read_text())
    assert {"quoted x@a.example", "co:lon@a.example", "gone@a.example", "@.c.example"} <= none
    for key, server in MAP:
        if key not in none and "+" not in key:
            user = key if not key.startswith("@") else f"anybody{key}"
            assert host(user) == hosts[server], user
    assert host("Anna@A.example") == hosts["new"]
    assert host("otto@a.example") == "old.example.com"


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_answers_by_what_was_exported(tmp_path: Path) -> None:
    """nginx -t takes the page's piece with the map, and its answer to auth_http names the server for each address."""
    text = exported("nginx", new="192.0.2.20", six="192.0.2.26")
    (tmp_path / "moved.map").write_text(text)
    port = free_port()
    config = tmp_path / "nginx.conf"
    inner = piece("nginx").replace("/etc/nginx/", f"{tmp_path}/").replace("127.0.0.1:9000", f"127.0.0.1:{port}")
    mail = re.compile(r"(?m)^mail \{.*?^\}\n", re.DOTALL)
    assert mail.search(inner)
    inner = mail.sub("", inner)  # a module that need not be installed
    paths = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    inner = inner.replace("http {\n", f"http {{\naccess_log off;\n{paths}", 1)
    config.write_text(f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\ndaemon off;\nevents {{}}\n{inner}")
    command = ["nginx", "-p", str(tmp_path), "-c", str(config)]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:

        def server(user: str) -> str:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/auth", headers={"Auth-User": user.encode().decode("latin-1")}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert (answer.status, answer.headers["Auth-Status"]) == (200, "OK")
                return str(answer.headers["Auth-Server"])

        def is_there() -> bool:
            try:
                return bool(server("x@y"))
            except OSError:
                return False

        wait_until(is_there, message=(tmp_path / "error.log").read_text)
        hosts = {"new": "192.0.2.20", "six": "192.0.2.26", "pin": "192.0.2.7"}
        assert left_out(text) == {"gone@a.example"}
        for key, name in MAP:
            if key != "gone@a.example":
                user = key if not key.startswith("@") else f"anybody@sub{key[1:]}" if key[1] == "." else f"x{key}"
                assert server(user) == hosts[name], user
        assert server("ANNA@A.example") == hosts["new"], "as the map has it, without regard to case"
        for other in ("otto@a.example", "x@c.example", "x@xb.example", "x@b.example.org", "xanna@a.example"):
            assert server(other) == "192.0.2.10", other
    finally:
        started.terminate()
        started.wait(20)


def test_csv_reads_back() -> None:
    rows = list(csv.DictReader(exported("csv").splitlines()))
    assert [(row["address"], row["server"]) for row in rows] == list(MAP)
    assert {row["note"] for row in rows} == {'a "note", of mine'}
