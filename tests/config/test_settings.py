"""The settings: three layers, one schema, every problem at once and no secret in any of them."""

from __future__ import annotations

import ast
import dataclasses
import ipaddress
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import file, model
from relay.config.destinations import resolve_password
from relay.config.loader import Settings, SettingsError, load
from relay.config.options import BACKUP_FIELDS, OPTIONS, SECTIONS
from relay.config.settings_toml import render
from relay.config.shown import describe
from relay.mail.destination import Destination

ROOT = Path(__file__).parents[2]
BAD = sorted((Path(__file__).parent / "bad_settings").glob("*.*"))
PRIMARY = {"relay.destination_primary": "old.example.com:25"}


def loaded(
    folder: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, str] | None = None
) -> Settings:
    return load(PRIMARY | dict(flags or {}), environ or {}, (folder,) if folder else ())


def written(folder: Path, text: str, name: str = "settings.toml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def problems_of(*args: object, **options: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(*args, **options)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_every_problem_of_a_bad_file_is_named(path: Path) -> None:
    """A bad configuration gives exactly the lines at its end, all at once, and shows no secret."""
    text = path.read_text(encoding="utf-8")
    environ = dict(re.findall(r"^# env (\w+)=(.*)$", text, re.MULTILINE))
    flags = {"config": str(path)} | dict(re.findall(r"^# flag ([\w.]+)=(.*)$", text, re.MULTILINE))
    expected = re.findall(r"^# => (.*)$", text, re.MULTILINE)
    found = [line.replace(str(path), "FILE") for line in problems_of(flags, environ, ())]
    assert found == expected
    assert "hun" not in "".join(found)


def test_the_file_at_the_root_is_the_schema_written_down() -> None:
    """settings.toml documents every option; relay/config/settings_toml.py says how it is written again."""
    assert (ROOT / "settings.toml").read_text(encoding="utf-8") == render()


def test_the_file_at_the_root_changes_nothing() -> None:
    """Running from a checkout is running on defaults, flags and variables."""
    assert tomllib.loads(render()) == {section: {} for section in SECTIONS}
    assert loaded(ROOT) == loaded()


def test_every_default_in_the_file_is_the_default(tmp_path: Path) -> None:
    """Removing the # in front of any option of settings.toml changes nothing."""
    options, _, tables = render().partition("# [[backup]]")
    uncommented = re.sub(r"^# (\w+ = )", r"\1", options, flags=re.MULTILINE)
    assert len(re.findall(r"(?m)^\w+ = ", uncommented)) == len(OPTIONS)
    from_file = loaded(written(tmp_path, uncommented))
    assert set(from_file.origins) == {option.key for option in OPTIONS}
    assert dataclasses.replace(from_file, origins={}) == dataclasses.replace(loaded(), origins={})
    backup = loaded(written(tmp_path, "[[backup]]" + re.sub(r"^# (\w+ = )", r"\1", tables, flags=re.MULTILINE))).backups
    assert backup == (Destination("new", "new.example.com", 25),)


def test_every_option_has_its_place_in_settings() -> None:
    """The table of options and the frozen Settings name the same things."""
    fields = {f"{name}.{field.name}" for name, kind in model.PARTS.items() for field in dataclasses.fields(kind)}
    assert fields | {"state_dir"} == {option.key for option in OPTIONS}
    assert {field.key for field in BACKUP_FIELDS} - {"url"} <= set(Destination.__slots__)
    assert len({option.flag for option in OPTIONS}) == len(OPTIONS)


def test_every_option_is_read_somewhere() -> None:
    """An option that nothing reads would be a promise in the documentation alone."""
    read = {
        owned
        for folder in ("relay", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in {"model.py", "options.py"}
        for owned in _read(ast.parse(path.read_text(encoding="utf-8")))
    }
    classes = {kind.__name__: name for name, kind in model.PARTS.items()} | {"Settings": "settings"}
    for part in ast.walk(ast.parse(Path(model.__file__).read_text(encoding="utf-8"))):
        if isinstance(part, ast.ClassDef) and part.name in classes:
            for prop in (p for p in part.body if isinstance(p, ast.FunctionDef)):
                if any((owner, prop.name) in read for owner in (classes[part.name], "settings")):
                    read |= {(classes[part.name], name) for owner, name in _read(prop) if owner == "self"}
    filled = {"relay.destination_primary": "primary", "relay.destination_backups": "backups"}  # by the loader
    unread = []
    for option in OPTIONS:
        section, _, name = filled.get(option.key, option.key).rpartition(".")
        if not {(section, name), ("settings", name)} & read:
            unread.append(option.key)
    assert unread == []


def _read(tree: ast.AST) -> set[tuple[str, str]]:
    """Return what is read: ("smtp", "listen") for settings.smtp.listen, smtp.listen, values["smtp.listen"].

    So it is for an argument that is annotated as SmtpSettings, whatever its name.
    """
    kinds = {kind.__name__: name for name, kind in model.PARTS.items()}
    called = {
        node.arg: kinds[node.annotation.id]
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in kinds
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found |= {(owner.lstrip("_"), node.attr), (called.get(owner, ""), node.attr)}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            section, _, name = str(node.slice.value).rpartition(".")
            found.add((section, name))
    return found


def test_defaults() -> None:
    """The defaults that the documentation and GoSMTP-dup promise."""
    settings = loaded()
    assert settings.primary == Destination("old.example.com:25", "old.example.com", 25)
    assert settings.backups == ()
    assert settings.smtp.listen == "127.0.0.1:2525"
    assert settings.smtp.addresses == (("127.0.0.1", 2525),)
    assert settings.smtp.domain == "localhost"
    assert settings.smtp.process_count == max(1, len(os.sched_getaffinity(0)) // 2)
    assert settings.smtp.max_message_bytes == 104857600
    assert settings.smtp.allowed_networks == (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
    assert settings.relay.timeout_seconds == 10.0
    assert settings.relay.final_timeout_seconds == 600.0
    assert settings.relay.uncertain_hold == 3600.0
    assert (settings.retry.first, settings.retry.longest, settings.retry.give_up) == (60.0, 3600.0, 432000.0)
    assert settings.spool.dir == settings.state_dir / "spool"
    assert settings.status.address == ("127.0.0.1", 8025)
    assert settings.origins == {"relay.destination_primary": "--primary"}


def test_the_configuration_of_gosmtp_dup_works_as_it_is(tmp_path: Path) -> None:
    """A config.yaml of GoSMTP-dup keeps its meaning."""
    text = """\
        smtp:
          listen: "0.0.0.0:2526"
          domain: "mx.example.com"
        relay:
          destination_primary: "localhost:1025"
          destination_backups:
            - "localhost:1026"
            - "backup.example.com:25"
          timeout_seconds: 30
        """
    settings = load({}, {}, [written(tmp_path, dedent(text), "config.yaml")])
    assert settings.smtp.addresses == (("0.0.0.0", 2526),)
    assert settings.smtp.domain == "mx.example.com"
    assert settings.primary == Destination("localhost:1025", "localhost", 1025)
    assert [backup.address for backup in settings.backups] == ["localhost:1026", "backup.example.com:25"]
    assert settings.relay.timeout_seconds == 30.0
    assert settings.origins["relay.timeout_seconds"] == f"{tmp_path / 'config.yaml'}:9"


@pytest.mark.parametrize("join", ["_", "__"])
def test_both_styles_of_variables(join: str) -> None:
    """The plain variable and dynaconf's double underscore mean the same; an empty one is not set."""
    environ = {
        f"SMTP_DUP_RELAY{join}DESTINATION_PRIMARY": "old.example.com",
        f"SMTP_DUP_RELAY{join}DESTINATION_BACKUPS": " a.example.com:25 ,, b.example.com:2525, ",
        f"SMTP_DUP_RELAY{join}TIMEOUT_SECONDS": "7",
        f"SMTP_DUP_RETRY{join}GIVE_UP": "2d",
        f"SMTP_DUP_SMTP{join}MAX_MESSAGE_BYTES": "10M",
        f"SMTP_DUP_SMTP{join}LISTEN": "",
        "SMTP_DUP_STATE_DIR": "/srv/smtp-dup",
        "SMTP_DUP_REDIS_URL": " ",
    }
    settings = load({}, environ, ())
    assert settings.primary is not None
    assert settings.primary.address == "old.example.com:25"
    assert [backup.name for backup in settings.backups] == ["a.example.com:25", "b.example.com:2525"]
    assert settings.relay.timeout_seconds == 7.0
    assert settings.retry.give_up == 172800.0
    assert settings.smtp.max_message_bytes == 10485760
    assert settings.smtp.listen == "127.0.0.1:2525"
    assert settings.spool.dir == Path("/srv/smtp-dup/spool")
    assert "redis.url" not in settings.origins


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    """The later layer wins, option by option."""
    written(tmp_path, '[smtp]\ndomain = "file"\nmax_hops = 1\nmax_recipients = 1')
    environ = {"SMTP_DUP_SMTP_MAX_HOPS": "2", "SMTP_DUP_SMTP_MAX_RECIPIENTS": "2"}
    settings = loaded(tmp_path, environ, {"smtp.max_recipients": "3"})
    assert (settings.smtp.domain, settings.smtp.max_hops, settings.smtp.max_recipients) == ("file", 2, 3)
    assert settings.origins["smtp.domain"] == f"{tmp_path / 'settings.toml'}:2"
    assert settings.origins["smtp.max_hops"] == "SMTP_DUP_SMTP_MAX_HOPS"
    assert settings.origins["smtp.max_recipients"] == "--smtp-max-recipients"


def test_a_variable_names_all_the_backups(tmp_path: Path) -> None:
    """Backups in a variable or flag replace the list and the tables of the file."""
    written(tmp_path, '[relay]\ndestination_backups = ["a"]\n[[backup]]\nurl = "b"')
    assert [backup.host for backup in loaded(tmp_path).backups] == ["a", "b"]
    settings = loaded(tmp_path, {"SMTP_DUP_RELAY_DESTINATION_BACKUPS": "c"})
    assert [backup.host for backup in settings.backups] == ["c"]
    settings = loaded(tmp_path, {"SMTP_DUP_RELAY_DESTINATION_BACKUPS": "c"}, {"relay.destination_backups": ""})
    assert settings.backups == ()


def test_the_first_folder_that_sets_anything_wins(tmp_path: Path) -> None:
    """One folder is read; a file without a single setting does not count."""
    here, etc = tmp_path / "here", tmp_path / "etc"
    written(etc, '[smtp]\ndomain = "etc"')
    written(here, render())
    assert load(PRIMARY, {}, (here, etc)).smtp.domain == "etc"
    written(here, "smtp: {max_hops: 9}", "config.yaml")
    settings = load(PRIMARY, {}, (here, etc))
    assert (settings.smtp.domain, settings.smtp.max_hops) == ("localhost", 9)


def test_two_files_in_one_folder_are_an_error(tmp_path: Path) -> None:
    """Nobody has to guess which of settings.toml and config.yaml holds."""
    written(tmp_path, "[smtp]\nmax_hops = 9")
    written(tmp_path, "smtp: {max_hops: 9}", "config.yaml")
    toml, yaml = tmp_path / "settings.toml", tmp_path / "config.yaml"
    assert problems_of(PRIMARY, {}, [tmp_path]) == [f"{toml}: {yaml} sets options too; keep one of the two files"]


def test_a_named_file_is_the_only_one(tmp_path: Path) -> None:
    """--config and SMTP_DUP_CONFIG name the only file; the flag wins."""
    here = written(tmp_path / "here", "[smtp]\nmax_hops = 1")
    other = written(tmp_path / "other", "[smtp]\nmax_recipients = 2", "other.toml") / "other.toml"
    third = written(tmp_path / "other", "smtp: {max_recipients: 3}", "third.yml") / "third.yml"
    settings = load(PRIMARY, {"SMTP_DUP_CONFIG": str(other)}, [here])
    assert (settings.smtp.max_hops, settings.smtp.max_recipients) == (50, 2)
    settings = load(PRIMARY | {"config": str(third)}, {"SMTP_DUP_CONFIG": str(other)}, [here])
    assert settings.smtp.max_recipients == 3


def test_dynaconf_reads_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither dynaconf's variables, nor .env, nor settings.local.toml, nor a parent folder's file come in."""
    child = written(tmp_path / "child", '[smtp]\nallowed_domains = ["5", "true", "1e3"]')
    written(child, "[smtp]\nmax_hops = 1", "settings.local.toml")
    written(child, "[smtp]\nmax_hops = 2", ".secrets.toml")
    written(child, "SMTP_DUP_SMTP_MAX_HOPS=3", ".env")
    written(tmp_path, "[smtp]\nmax_hops = 4")
    monkeypatch.chdir(child)
    for name in ("SETTINGS_FILE", "INCLUDES", "PRELOAD", "SECRETS"):
        monkeypatch.setenv(f"{name}_FOR_DYNACONF", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("DYNACONF_SMTP__MAX_HOPS", "5")
    monkeypatch.setenv("SMTP__MAX_HOPS", "6")
    settings = load(PRIMARY, {}, [child])
    assert settings.smtp.max_hops == 50
    assert settings.smtp.allowed_domains == ("5", "true", "1e3")
    (child / "settings.toml").unlink()
    assert load(PRIMARY, {}, [Path()]).smtp.max_hops == 50


def test_what_a_folder_hides_is_an_error(tmp_path: Path) -> None:
    """A file that may not be read, or is none, is named instead of passed over."""
    (tmp_path / "settings.toml").mkdir()
    assert problems_of(PRIMARY, {}, [tmp_path]) == [f"{tmp_path / 'settings.toml'}: cannot be read: Is a directory"]
    (tmp_path / "settings.toml").rmdir()
    (tmp_path / "settings.toml").write_bytes(b'[smtp]\ndomain = "\xff"')
    assert problems_of(PRIMARY, {}, [tmp_path]) == [f"{tmp_path / 'settings.toml'}: is not UTF-8"]


def test_what_kubernetes_adds_is_not_ours() -> None:
    """A Kubernetes service called smtp-dup does not keep its own pods from starting."""
    environ = {
        "SMTP_DUP_SERVICE_HOST": "10.0.0.1",
        "SMTP_DUP_SERVICE_PORT": "2525",
        "SMTP_DUP_SERVICE_PORT_SMTP": "2525",
        "SMTP_DUP_PORT": "tcp://10.0.0.1:2525",
        "SMTP_DUP_PORT_2525_TCP": "tcp://10.0.0.1:2525",
        "SMTP_DUP_PORT_2525_TCP_PORT": "2525",
        "SMTP_DUP_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
    }
    assert loaded(environ=environ) == loaded()


def test_no_primary_is_needed_by_commands_that_send_nothing() -> None:
    """`workers`, `queue` and `failed` start without one."""
    settings = load({}, {}, (), require_primary=False)
    assert settings.primary is None
    assert settings.value("relay.destination_primary") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("old", Destination("old:25", "old", 25)),
        ("OLD.Example.com:2525", Destination("old.example.com:2525", "old.example.com", 2525)),
        ("old_mail-1:25", Destination("old_mail-1:25", "old_mail-1", 25)),
        ("[2001:db8::1]", Destination("[2001:db8::1]:25", "2001:db8::1", 25)),
        ("192.0.2.1:26", Destination("192.0.2.1:26", "192.0.2.1", 26)),
        ("smtp://old/", Destination("old:25", "old", 25)),
        ("smtps://old", Destination("old:465", "old", 465, scheme="smtps", tls="encrypt")),
        ("LMTP://old", Destination("old:24", "old", 24, scheme="lmtp")),
        ("smtp://[::1]:26?tls=verify", Destination("[::1]:26", "::1", 26, tls="verify")),
        (
            "smtp://us%40er:p%2F%3A%2C%23%C3%BC%25@old:587",
            Destination("old:587", "old", 587, tls="encrypt", username="us@er", password="p/:,#ü%"),
        ),
        (
            "smtp://user:pass:word@old?tls=none",
            Destination("old:25", "old", 25, tls="none", username="user", password="pass:word"),
        ),
    ],
)
def test_destinations(text: str, expected: Destination) -> None:
    """host:port and URLs; with a password nothing is sent in the clear unless the settings say so."""
    assert load({"relay.destination_primary": text}, {}, ()).primary == expected


def test_a_backup_table(tmp_path: Path, certificate_file: Path) -> None:
    """Every field of a [[backup]] table arrives in its Destination, in TOML and in YAML."""
    table = {
        "url": "smtp://user@new.example.com:2525",
        "name": "new",
        "domains": ["Example.com", "example.org"],
        "sender": "null",
        "soft_bounce": True,
        "connections": 5,
        "tls": "verify",
        "ca_file": str(certificate_file),
        "password_from": "env:SMTP_DUP_NEW_PASSWORD",
    }
    expected = Destination(
        "new",
        "new.example.com",
        2525,
        tls="verify",
        username="user",
        password="hunter2",
        password_from="env:SMTP_DUP_NEW_PASSWORD",
        domains=("example.com", "example.org"),
        sender="null",
        soft_bounce=True,
        connections=5,
        ca_file=str(certificate_file),
    )
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in table.items()
    ]
    written(
        tmp_path / "toml", "\n".join(["[workers]", "connections = 7", "[[backup]]", *lines, "[[backup]]", "url='b'"])
    )
    lines = [f"    {key}: {str(value).lower() if isinstance(value, bool) else value!r}" for key, value in table.items()]
    written(
        tmp_path / "yaml",
        "\n".join(["workers: {connections: 7}", "backup:", "  -", *lines, "  - url: b"]),
        "config.yaml",
    )
    for folder in ("toml", "yaml"):
        settings = loaded(tmp_path / folder, {"SMTP_DUP_NEW_PASSWORD": "hunter2"})
        assert settings.backups == (expected, Destination("b:25", "b", 25, connections=7))


@pytest.fixture
def certificate_file(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_text("not looked into here", encoding="ascii")
    return path


def test_the_variable_of_a_password_is_no_unknown_one() -> None:
    """A variable whose name begins like ours may hold a password, also where a flag of one backup names it."""
    flags = {"backup[new].password_from": "env:SMTP_DUP_NEW_PASSWORD", "relay.destination_backups": "new=smtp://u@b"}
    settings = load({**flags, "relay.destination_primary": "a"}, {"SMTP_DUP_NEW_PASSWORD": "hunter2"}, ())
    assert settings.backups[0].password == "hunter2"


def test_a_password_by_reference(tmp_path: Path) -> None:
    """A secret comes from a variable or a file, without the file's last newline; a name without one is no secret."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2 \n", encoding="utf-8")
    assert resolve_password(f"file:{secret}", {}) == "hunter2 "
    assert resolve_password("env:X", {"X": "hunter2"}) == "hunter2"
    settings = load({"relay.destination_primary": f"smtp://user@old?password_from=file:{secret}"}, {}, ())
    assert settings.primary is not None
    assert (settings.primary.password, settings.primary.password_from) == ("hunter2 ", f"file:{secret}")
    secret.write_text("\n", encoding="utf-8")
    for reference in (f"file:{secret}", "env:X", "env:", "hunter2", "file:relative"):
        with pytest.raises(ValueError, match=r"^(?!.*hunter2)"):
            resolve_password(reference, {})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("retry.first", "30", 30.0),
        ("retry.first", "90s", 90.0),
        ("retry.first", "0.5m", 30.0),
        ("retry.give_up", "5D", 432000.0),
        ("smtp.greeting_delay", "0", 0.0),
        ("smtp.max_message_bytes", "0", 0),
        ("smtp.max_message_bytes", "64k", 65536),
        ("spool.min_free", "1.5G", 1610612736),
        ("smtp.listen", ":25, [::1]:26", ":25,[::1]:26"),
        ("status.listen", "off", ""),
        ("status.listen", "", ""),
        ("relay.require_durable_copies", "Yes", True),
        ("smtp.domain", "[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
        ("smtp.allowed_domains", " Example.COM , müller.example,", ("example.com", "müller.example")),
        ("redis.url", "unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("log.format", "JSON", "json"),
    ],
)
def test_values(key: str, text: str, value: object) -> None:
    """Durations, sizes, lists, addresses and switches as they are written in variables and flags."""
    assert loaded(flags={key: text}).value(key) == value


def test_no_spool_needs_durable_copies() -> None:
    """spool.dir = "none" is accepted together with relay.require_durable_copies."""
    settings = loaded(flags={"spool.dir": "none", "relay.require_durable_copies": "true"})
    assert settings.spool.dir is None


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's folder, root's, the user's own; and the one that is named."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    home = {"HOME": "/home/u"}
    assert loaded(environ=home).state_dir == Path("/home/u/.local/state/smtp-dup")
    assert loaded(environ=home | {"XDG_STATE_HOME": "/x"}).state_dir == Path("/x/smtp-dup")
    assert loaded(environ=home | {"STATE_DIRECTORY": "/a:/b"}).state_dir == Path("/a")
    assert loaded(environ=home | {"SMTP_DUP_STATE_DIR": "state"}).state_dir == Path("state").absolute()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert loaded(environ=home).state_dir == Path("/var/lib/smtp-dup")


def test_a_package_s_own_defaults_are_below_every_file(tmp_path: Path) -> None:
    """SMTP_DUP_DEFAULTS, as the container image sets it, counts only where nobody says otherwise."""
    defaults = tmp_path / "defaults.toml"
    defaults.write_text('state_dir = "/var/lib/there"\n[smtp]\nlisten = ":2525"\nallowed_networks = ["10.0.0.0/8"]\n')
    environ = {"SMTP_DUP_DEFAULTS": str(defaults)}
    settings = load(PRIMARY, environ, [tmp_path / "none"])
    assert (settings.smtp.listen, settings.state_dir) == (":2525", Path("/var/lib/there"))
    assert settings.origins["smtp.listen"] == f"{defaults}:3"
    (tmp_path / "config.yaml").write_text('smtp:\n  listen: "0.0.0.0:25"\n')
    settings = load(PRIMARY, environ | {"SMTP_DUP_STATE_DIR": "/elsewhere"}, [tmp_path])
    assert (settings.smtp.listen, settings.state_dir) == ("0.0.0.0:25", Path("/elsewhere"))
    assert settings.smtp.allows("10.1.2.3")
    defaults.write_text("[smtp]\nlisten = 5\nlistne = 6\n")
    with pytest.raises(SettingsError) as caught:
        load(PRIMARY, environ, [tmp_path / "none"])
    assert {problem.key for problem in caught.value.problems} == {"smtp.listen", "smtp.listne"}


def test_who_may_connect() -> None:
    """allowed_networks holds for both families, for IPv4 on an IPv6 socket too, and for nothing else."""
    smtp = loaded(flags={"smtp.allowed_networks": "192.0.2.0/24, 2001:db8::/32"}).smtp
    assert [smtp.allows(a) for a in ("192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1")] == [True] * 3
    assert [smtp.allows(a) for a in ("127.0.0.1", "::1", "unix", "")] == [False] * 4


def test_describe_shows_origins_and_no_secret(tmp_path: Path) -> None:
    """Everything that `smtp-dup check` shows: value, default, origin; passwords are stars, in lists and queries too."""
    table = '[[backup]]\nname = "new"\nurl = "smtp://user:hunter2@new"\nsender = "null"\ndomains = ["a.example"]'
    written(tmp_path, f'[relay]\ndestination_backups = ["a", "smtp://x:hunter2@b"]\n{table}')
    environ = {"SMTP_DUP_REDIS_URL": "redis://:hunter2@redis:6379/0?password=hunter2"}
    settings = loaded(tmp_path, environ, {"relay.destination_primary": "smtps://user:hunter2@old", "retry.first": "90"})
    rows = {row.key: row[1:] for row in describe(settings)}
    assert "hunter2" not in repr(rows)
    assert "hunter2" not in repr(settings)
    assert set(rows) == {option.key for option in OPTIONS} | {"backup.new"}
    assert rows["relay.destination_primary"] == ("smtps://user:***@old", "", "--primary")
    assert rows["relay.destination_backups"][0] == "a, smtp://x:***@b"
    assert rows["redis.url"] == ("redis://:***@redis:6379/0?password=***", "", "SMTP_DUP_REDIS_URL")
    assert rows["retry.first"] == ("90", "1m", "--retry-first")
    assert rows["smtp.max_message_bytes"] == ("100M", "100M", "default")
    assert rows["backup.new"] == (
        "smtp://user:***@new:25 tls=encrypt sender=null connections=0 domains=a.example",
        "",
        f"{tmp_path / 'settings.toml'}:3",
    )


@given(
    st.text(max_size=6),
    st.sampled_from(["smtp://user:", "user:", "smtps://", "redis://:", ""]),
    st.text("@:/?#,[]%& ", max_size=3),
)
def test_no_password_is_ever_shown(junk: str, front: str, back: str) -> None:
    """However badly a password is escaped, neither an error nor `smtp-dup check` shows a piece of it."""
    text = f"{front}hunt{junk}er2{back}@host.example:2500"
    for key in ("relay.destination_primary", "relay.destination_backups", "redis.url"):
        try:
            shown = repr(describe(load(PRIMARY | {key: text}, {}, ())))
        except SettingsError as error:
            shown = str(error)
        lone_user = front in {"smtps://", ""}  # a user without a password, which is no secret
        assert lone_user or ("hunt" not in shown and "er2" not in shown)


def imports_dynaconf(folder: Path) -> bool:
    """Say whether settings that are loaded in this folder bring dynaconf with them."""
    program = (
        "import sys\nfrom relay.config.loader import load\n"
        "load({'relay.destination_primary': 'old.example.com:25'}, {})\n"
    )
    words = [sys.executable, "-c", program + "print('dynaconf' in sys.modules)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("text", [None, "# nothing\n\n[smtp]  # nor here\n# listen = 1\n", "[smtp]\nmax_hops = 9\n"])
def test_dynaconf_is_there_only_for_a_file_that_sets_something(tmp_path: Path, text: str | None) -> None:
    """Variables and flags alone cost no process the memory of what reads files; a bare file is none."""
    if text is not None:
        written(tmp_path, text)
    assert imports_dynaconf(tmp_path) == (text is not None and "max_hops" in text)


def test_the_bare_file_that_comes_along_is_not_read() -> None:
    """The settings.toml of a checkout sets nothing, and that is seen without dynaconf."""
    assert not imports_dynaconf(ROOT)


@pytest.mark.parametrize("text", ["# only words\n[smtpd]\n", "[[backup]]\n", "x\n", "[smtp\n", "[smtp] x\n"])
def test_a_file_with_anything_else_is_read(tmp_path: Path, text: str) -> None:
    """Only comments and our headings are passed over: whatever else a file says is told."""
    written(tmp_path, text)
    assert problems_of(PRIMARY, {}, [tmp_path])


def test_only_the_settings_file_imports_dynaconf() -> None:
    """What dynaconf does behind one's back stays behind one door."""
    importers = {
        path.relative_to(ROOT).as_posix()
        for folder in ("relay", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(from|import) dynaconf", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importers == {"relay/config/file.py"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings.toml", "state_dir = '/srv/x'\r\n[smtp]\r\nlisten = '127.0.0.1:2526'\r\n"),
        ("settings.yaml", "state_dir: /srv/x\nsmtp:\n  listen: 127.0.0.1:2526\n"),
    ],
)
def test_a_byte_order_mark_in_front_is_no_part_of_the_file(tmp_path, name, text):
    """What an editor of Windows saves as UTF-8 is read like any other, with the lines of its keys."""
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = file.read(path)
    assert found.data["state_dir"] == "/srv/x"
    assert found.data["smtp"]["listen"] == "127.0.0.1:2526"
    assert found.lines["smtp.listen"] in {2, 3}


# The primary as it would be a backup -----------------------------------------------------------------------------


def test_a_primary_may_have_a_name() -> None:
    """As a backup's: in front of its address or URL, which may hold = itself; else host:port is its name."""
    for text, name, host in (
        ("old=old.example.com:25", "old", "old.example.com"),
        ("old=smtp://user:a=b@old.example.com:25", "old", "old.example.com"),
        ("smtp://user:a=b@old.example.com", "old.example.com:25", "old.example.com"),
        ("old.example.com:2525", "old.example.com:2525", "old.example.com"),
    ):
        primary = loaded(flags={"relay.destination_primary": text}).primary
        assert primary
        assert (primary.name, primary.host) == (name, host)
    with pytest.raises(SettingsError, match="taken by the primary"):
        loaded(flags={"relay.destination_primary": "x=a.example:25", "relay.destination_backups": "x=b.example:25"})


@pytest.mark.parametrize(
    ("written_as", "sender", "soft_bounce"),
    [
        ("", "null", False),
        ('demoted = {sender = "keep", soft_bounce = true}', "keep", True),
        ("demoted = {soft_bounce = true}", "null", True),
        ('demoted = "sender=keep"', "keep", False),
    ],
)
def test_how_a_demoted_primary_gets_copies(tmp_path: Path, written_as: str, sender: str, soft_bounce: bool) -> None:
    """A table in the file, text in a variable; what is left out stands at its default."""
    found = loaded(written(tmp_path / "a", f"[relay]\n{written_as}\n"))
    assert found.demoted
    assert (found.demoted.sender, found.demoted.soft_bounce) == (sender, soft_bounce)
    assert (found.demoted.name, found.demoted.host) == ("old.example.com:25", "old.example.com")
    environ = {"SMTP_DUP_RELAY_DEMOTED": f"sender={sender}, soft_bounce={str(soft_bounce).lower()}"}
    assert loaded(environ=environ).demoted == found.demoted


@pytest.mark.parametrize("value", ["sender=maybe", "soft_bounce", "senders=null", "sender", "soft_bounce=2"])
def test_nonsense_about_a_demoted_primary(value: str) -> None:
    """It is a problem as any other, with what was expected."""
    with pytest.raises(SettingsError, match=r"relay\.demoted.*expected"):
        loaded(environ={"SMTP_DUP_RELAY_DEMOTED": value})


def test_a_table_says_how_the_primary_would_be_a_backup(tmp_path: Path) -> None:
    """With its name and its address: it is no backup, and `check` shows it; one of the two alone is a mistake."""
    primary = '[relay]\ndestination_primary = "old=old.example.com:25"\n'
    table = primary + '[[backup]]\nname = "{}"\nurl = "{}"\nconnections = 7\n'
    other = '[[backup]]\nname = "new"\nurl = "new.example.com"\n'
    folder = written(tmp_path / "a", table.format("old", "old.example.com:25") + other)
    found = load({}, {}, (folder,))
    assert [backup.name for backup in found.backups] == ["new"]
    assert found.demoted
    assert (found.demoted.connections, found.demoted.sender) == (7, "keep")
    assert any(row.key == "backup.old" and "connections=7" in row.value for row in describe(found))
    for name, url, text in (
        ("older", "old.example.com:25", "same server as the primary"),
        ("old", "other.example.com:25", "is taken by the primary"),
    ):
        with pytest.raises(SettingsError, match=text):
            load({}, {}, (written(tmp_path / name, table.format(name, url) + other),))
