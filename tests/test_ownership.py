"""Files of passwords and keys that another user may write to are refused at the start; the line says what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relay import ownership, private_files
from relay.config.destinations import resolve_password
from relay.config.loader import SettingsError, load
from relay.daemon import start
from relay.mail import encryption
from relay.smtpd.credentials import Credentials
from relay.smtpd.passwords import Users, hash_password
from support.certificates import Certificate

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def given_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def open_to_the_group(path: Path) -> None:
    path.chmod(0o660)


def open_to_all(path: Path) -> None:
    path.chmod(0o646)


def read_key(path: Path, _: Certificate) -> None:
    path.write_text(encryption.new_key() + "\n")
    _changed(path)
    encryption.Keyring(path)


def read_users(path: Path, _: Certificate) -> None:
    path.write_text(f"anna:{hash_password('x')}\n")
    _changed(path)
    Users.read(path)


def read_password(path: Path, _: Certificate) -> None:
    path.write_text("hunter2\n")
    _changed(path)
    assert resolve_password(f"file:{path}", {}) == "hunter2"


def read_our_key(path: Path, certificate: Certificate) -> None:
    path.write_bytes(certificate.key.read_bytes())
    _changed(path)
    flags = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(path)}
    Credentials.load(load({"relay.destination_primary": "localhost:25", **flags}, environ={}, directories=()).smtp)


def read_client_key(path: Path, certificate: Certificate) -> None:
    path.write_bytes(certificate.key.read_bytes())
    _changed(path)
    backup = f"smtp://new.example?tls=encrypt&tls_certificate={certificate.certificate}&tls_key={path}"
    flags = {"relay.destination_primary": "localhost:25", "relay.destination_backups": backup}
    load(flags, environ={}, directories=())


READERS = (read_key, read_users, read_password, read_our_key, read_client_key)
_change: list[Callable[[Path], None]] = []


def _changed(path: Path) -> None:
    path.chmod(0o600)
    _change[0](path)


@pytest.fixture
def changing(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    _change[:] = [request.param]
    return request.param


@as_root
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("changing", [given_away, open_to_the_group, open_to_all], indirect=True)
def test_what_others_may_write_is_no_secret(
    tmp_path: Path, certificate: Certificate, reader: Callable[[Path, Certificate], None], changing: object
) -> None:
    """One line names the file and what to do, and nothing of what is in it."""
    with pytest.raises((OSError, ValueError, SettingsError)) as refused:
        reader(tmp_path / "secret", certificate)
    text = str(refused.value)
    assert "secret" in text
    assert "chown it to root" in text or "chmod" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("changing", [lambda path: path.chmod(0o600), lambda path: path.chmod(0o400)], indirect=True)
def test_what_only_we_may_write_is_read(
    tmp_path: Path, certificate: Certificate, reader: Callable[[Path, Certificate], None], changing: object
) -> None:
    """Our own files, read-only ones among them, are used as ever."""
    reader(tmp_path / "secret", certificate)


@as_root
def test_root_reads_what_the_owner_of_the_state_folder_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sudo smtp-dup check`: the service's own files are no stranger's to root; another user's still are."""
    monkeypatch.setattr(ownership, "_trusted", {0})
    state, secret, other = tmp_path / "state", tmp_path / "secret", tmp_path / "other"
    state.mkdir()
    for file, owner in ((secret, STRANGER), (other, STRANGER + 1)):
        file.write_text("x")
        file.chmod(0o400)
        os.chown(file, owner, owner)
    os.chown(state, STRANGER, STRANGER)
    assert ownership.fault_of_secret(secret)
    load({"relay.destination_primary": "localhost:25", "state_dir": str(state)}, environ={}, directories=())
    assert not ownership.fault_of_secret(secret)
    assert ownership.fault_of_secret(other)


@as_root
def test_folders_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that others may write to is closed; a stranger's, and one that is everybody's by design, is refused."""
    monkeypatch.setattr(ownership, "_trusted", {0})
    monkeypatch.setattr("relay.maillog.notice", lambda *_args, **_fields: None)
    ours = tmp_path / "ours"
    for mode in (0o777, 0o770, 0o2775):
        ours.mkdir(exist_ok=True)
        ours.chmod(mode)
        private_files.folder(ours, is_named=True)
        assert ours.stat().st_mode & 0o777 == 0o700
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, STRANGER, STRANGER)
    with pytest.raises(private_files.Foreign, match=f"belongs to user {STRANGER}"):
        private_files.folder(theirs)
    everybodys = tmp_path / "tmp"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    with pytest.raises(private_files.Foreign, match="name a folder below it"):
        private_files.folder(everybodys, is_named=True)
    assert everybodys.stat().st_mode & 0o7777 == 0o1777


@as_root
@pytest.mark.parametrize("change", [given_away, open_to_the_group, open_to_all, None])
def test_settings_that_another_user_could_change_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None] | None
) -> None:
    """Whoever can write there decides where mail goes: one line says so at the start."""
    path = tmp_path / "settings.toml"
    path.write_text('[relay]\ndestination_primary = "localhost:25"\n')
    path.chmod(0o644)
    if change is not None:
        change(path)
    told: list[str] = []
    monkeypatch.setattr(start.maillog, "notice", lambda _level, text, **fields: told.append(f"{text}: {fields}"))
    start.warn_of_settings_files(load({"config": str(path)}, environ={}, directories=()))
    assert len(told) == (change is not None)
    assert all(str(path) in line for line in told)
