"""Which route an address takes: every form of an address against every form of an entry, as data."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.loader import SettingsError, load
from relay.mail.address_keys import entry_key, lookup_keys
from relay.mail.destination import Destination
from relay.routing import table_store
from relay.routing.decisions import Router, by_weight, owed
from relay.routing.fixed_database import FixedDatabase
from relay.routing.loading import router_of
from relay.routing.table_file import BadTable, parse

# An entry of a table, an address, and whether it is matched.
ROWS: tuple[tuple[str, str, bool], ...] = (
    ("anna@example.com", "anna@example.com", True),
    ("anna@example.com", "ANNA@EXAMPLE.COM", True),
    ("Anna@Example.Com", "anna@example.com", True),
    ("anna@example.com", "anna@example.com.", True),
    ("anna@example.com", "anna@sub.example.com", False),
    ("anna@example.com", "annab@example.com", False),
    ("anna@example.com", "xanna@example.com", False),
    ("anna@example.com", "anna@example.org", False),
    ("anna@example.com", "anna+tag@example.com", True),
    ("anna@example.com", "anna+tag+more@example.com", True),
    ("anna@example.com", "anna+@example.com", True),
    ("anna@example.com", "anna-tag@example.com", False),
    ("anna@example.com", "+anna@example.com", False),
    ("anna+tag@example.com", "anna+tag@example.com", True),
    ("anna+tag@example.com", "Anna+TAG@example.com", True),
    ("anna+tag@example.com", "anna@example.com", False),
    ("anna+tag@example.com", "anna+other@example.com", False),
    ("+tag@example.com", "+tag@example.com", True),
    ("+tag@example.com", "anna+tag@example.com", False),
    ("@example.com", "anna@example.com", True),
    ("@example.com", "anna@EXAMPLE.com", True),
    ("@example.com", "anna+tag@example.com", True),
    ("@example.com", "anna@sub.example.com", False),
    ("@example.com", "anna@notexample.com", False),
    ("@example.com", "anna@example.com.evil.example", False),
    ("@example.com", "anna@com", False),
    ("example.com", "anna@example.com", True),
    ("example.com", "anna@sub.example.com", False),
    ("@example.com.", "anna@example.com", True),
    ("@.example.com", "anna@sub.example.com", True),
    ("@.example.com", "anna@deep.sub.example.com", True),
    ("@.example.com", "anna@example.com", False),
    ("@.example.com", "anna@xexample.com", False),
    (".example.com", "anna@sub.example.com", True),
    (".example.com", "anna@example.com", False),
    ("@.com", "anna@example.com", True),
    ("@localhost", "anna@localhost", True),
    ("*", "anna@example.com", True),
    ("*", "anna@[192.0.2.1]", True),
    ("*", "postmaster", False),
    ("*", "", False),
    ("postmaster@example.com", "postmaster", False),
    ("postmaster@example.com", "Postmaster@example.com", True),
    ("<>", "", True),
    ("<>", "anna@example.com", False),
    ("@[192.0.2.1]", "anna@[192.0.2.1]", True),
    ("@[192.0.2.1]", "anna@[192.0.2.10]", False),
    ("@[ipv6:2001:db8::1]", "anna@[IPv6:2001:DB8::1]", True),
    ('"john doe"@example.com', '"john doe"@example.com', True),
    ('"john doe"@example.com', '"John Doe"@example.com', True),
    ("john@example.com", '"john"@example.com', True),
    ('"john"@example.com', "john@example.com", True),
    ('"a@b"@example.com', '"a@b"@example.com', True),
    ('"a@b"@example.com', '"a\\@b"@example.com', True),
    ("@b", '"a@b"@example.com', False),
    ('"john+tag"@example.com', "john+tag@example.com", True),
    ("john@example.com", '"john+tag"@example.com', True),
    ("@bücher.example", "anna@bücher.example", True),
    ("@bücher.example", "anna@BÜCHER.example", True),
    ("@bücher.example", "anna@xn--bcher-kva.example", True),
    ("@xn--bcher-kva.example", "anna@bücher.example", True),
    ("@XN--BCHER-KVA.example", "anna@bu\u0308cher.example", True),
    ("@bücher.example", "anna@bucher.example", False),
    ("@.bücher.example", "anna@mail.bücher.example", True),
    ("@straße.example", "anna@xn--strae-oqa.example", True),
    ("@straße.example", "anna@strasse.example", False),
    ("@例え.テスト", "anna@xn--r8jz45g.xn--zckzah", True),
    ("@例え.テスト", "anna@例え。テスト", True),
    ("jürgen@example.com", "JÜRGEN@example.com", True),
    ("jürgen@example.com", "ju\u0308rgen@example.com", True),
    ("用户@example.com", "用户@example.com", True),
    ("用户@example.com", "用户+标签@example.com", True),
    ("anna@example.com", "<bad>anna", False),
    ("anna@example.com", "@relay.example:anna@example.com", True),
    ("@example.com", "anna\udcff@example.com", True),
    ("@example.com", "anna@example\udcff.com", False),
    # What RFC 5321 calls source routes, and what older mail systems put into local parts.
    ("anna@example.com", "@a.example,@b.example:anna@example.com", True),
    ("@example.com", "@a.example:anna@example.com", True),
    ("@a.example", "@a.example:anna@example.com", False),
    ('"@a:b"@example.com', '"@a:b"@example.com', True),
    ("b@example.com", '"@a:b"@example.com', False),
    ("@example.com", "anna%example.org@example.com", True),
    ("anna@example.com", "anna%example.org@example.com", False),
    ("@example.org", "anna%example.org@example.com", False),
    ("@example.com", "example.org!anna@example.com", True),
    ("anna@example.com", "example.org!anna@example.com", False),
    # Dots, case and both forms of a domain together.
    ("@EXAMPLE.COM", "anna@example.com.", True),
    ("@bücher.example", "anna@XN--BCHER-KVA.EXAMPLE.", True),
    ("anna@xn--bcher-kva.example", "ANNA+x@bücher.example", True),
    ("@.example", "anna@BÜCHER.example.", True),
    ("@exa_mple.com", "anna@EXA_mple.com", True),
    ("@example.com", "anna@example.com..", False),
    ("@example.com", "anna@.example.com", False),
    # Quotes around what needs some, and around what does not.
    ("anna@example.com", '"anna"@EXAMPLE.COM', True),
    ('"a\\"b"@example.com', '"a\\"b"@example.com', True),
    ('" "@example.com', '" "@example.com', True),
    ('"anna+a b"@example.com', '"anna+a b"@example.com', True),
    ("anna@example.com", '"anna+a b"@example.com', True),
    # Literals, and what looks like one.
    ("@[192.0.2.1]", "anna@192.0.2.1", False),
    ("@[ipv6:2001:db8::1]", "anna@[IPv6:2001:db8:0:0:0:0:0:1]", True),
    ("@[IPv6:2001:0DB8::0001]", "anna@[ipv6:2001:db8::1]", True),
    ("@.1", "anna@[192.0.2.1]", False),
    # Without a domain there is no key, but for the null sender.
    ("*", "anna", False),
    ("anna@example.com", "anna", False),
    ("@example.com", "postmaster", False),
    ("postmaster@example.com", "POSTMASTER@EXAMPLE.COM", True),
    ("*", "postmaster@example.com", True),
    ("@example.com", "@example.com", True),
    ("<>", "<>", False),
)


def router_of_routes(routes: str) -> Router:
    made = loaded(routes)
    return router_of(made, {path: table(path) for route in made.route_table for path in route.files})


def table(path: Path) -> table_store.Table:
    return table_store.read(path, SERVERS, fold=True)


SERVERS = [Destination(name, f"{name}.example.net", 25) for name in ("a", "b", "c")]
HEAD = """
[relay]
destination_primary = "a=a.example.net:25"
[[server]]
name = "b"
url = "b.example.net:25"
[[server]]
name = "c"
url = "c.example.net:25"
"""


def loaded(routes: str):

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.toml").write_text(HEAD + routes)
        return load({}, {}, [Path(folder)])


@pytest.mark.parametrize(("entry", "address", "is_matched"), ROWS, ids=ascii)
def test_address_forms(entry: str, address: str, is_matched: bool, tmp_path: Path) -> None:
    """An entry matches an address in the settings, in a list, in a transport map, in a CSV and in SQLite alike."""
    key = entry_key(entry, fold=True)
    assert (key in lookup_keys(address, fold=True)) is is_matched
    quoted = '"' + entry.replace('"', '""') + '"'
    forms = {
        "list": f"# a list\n\n{entry}\n",
        "map": f"other@example.org smtp:[a.example.net]\n{entry}\n    smtp:[b.example.net]:25\n",
        "csv": f"email,server\nother@example.org,a\n{quoted},b\n",
    }
    for name, text in forms.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        note = table_store.update(tmp_path, path, SERVERS, fold=True)
        found = table_store.Table.load(tmp_path, path)
        for one in (found, _in_database(found, tmp_path)):
            hit = one.find(lookup_keys(address, fold=True)) if lookup_keys(address, fold=True) else None
            assert (hit is not None and hit[0] == key) is is_matched, (name, note)
            if hit is not None and hit[0] == key:
                assert hit[1] == (() if name == "list" else ("b",))


def _in_database(found: table_store.Table, state_dir: Path) -> table_store.Table:
    """Return the same table as a large one is, looked up in its file."""
    path = state_dir / "tables" / found.note.name
    return table_store.Table(found.note, found.stamp, path, None, FixedDatabase(path))


def test_case_of_local_parts_counts_when_asked() -> None:
    assert entry_key("Anna@Example.com", fold=False) == "Anna@example.com"
    assert "anna@example.com" not in lookup_keys("Anna@example.com", fold=False)


@pytest.mark.parametrize(
    "entry",
    ["", "@", "a b@example.com", "anna@", "a@b@", "@exa mple.com", "@.", "@..com", "/regexp/", "@-x.example", "@[1"],
)
def test_what_is_no_entry(entry: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        entry_key(entry, fold=True)


# --- the first match counts -----------------------------------------------------------------------------------------

ORDER = """
[[route]]
name = "one"
match = { recipients = "vip@shop.example", clients = ["10.0.0.0/8", "2001:db8::/32"] }
primary = "c"
[[route]]
name = "two"
match = { recipients = ["@shop.example", "@.shop.example"], senders = "@news.example" }
primary = ["b", "c"]
[[route]]
name = "three"
match = { recipients = "@shop.example" }
primary = { b = 1, c = 3 }
backups = ["a"]
"""


@pytest.mark.parametrize(
    ("address", "sender", "client", "route"),
    [
        ("vip@shop.example", "x@example.org", "10.1.2.3", "one"),
        ("vip@shop.example", "x@example.org", "::ffff:10.1.2.3", "one"),
        ("vip@shop.example", "x@example.org", "2001:db8::1", "one"),
        ("vip@shop.example", "x@news.example", "192.0.2.1", "two"),
        ("vip@shop.example", "x@example.org", "192.0.2.1", "three"),
        ("vip@sub.shop.example", "x@news.example", "10.1.2.3", "two"),
        ("vip@sub.shop.example", "", "10.1.2.3", "default"),
        ("vip@example.com", "x@news.example", "10.1.2.3", "default"),
        ("postmaster", "x@news.example", "10.1.2.3", "default"),
    ],
)
def test_the_first_route_that_matches_counts(address: str, sender: str, client: str, route: str) -> None:
    plan = router_of_routes(ORDER).plan("a", sender, client)
    assert plan.settled is None
    assert plan.decide(address).route.name == route


def test_the_recipient_does_not_matter_where_one_primary_answers_in_all_cases() -> None:
    """Then MAIL goes through at once; else it waits for the first recipient."""
    same = '[[route]]\nname = "x"\nprimary = "a"\nmatch = {{ recipients = "@x.example" }}\nbackups = ["{}"]\n'
    assert router_of_routes(same.format("b")).plan("a", "", "192.0.2.1").settled is not None
    assert router_of_routes(same.format("b")).plan("c", "", "192.0.2.1").settled is None  # c was promoted
    every = '[[route]]\nname = "x"\nprimary = {primary}\nmatch = {{ clients = "10.0.0.0/8" }}\n{more}'
    for primary, more, is_settled in (
        ('"b"', "", True),
        ('["b", "c"]', "", True),
        ("{ b = 1, c = 1 }", "", False),
        ("{ b = 1, c = 1 }", 'stick = "sender"', True),
        ("{ b = 1, c = 1 }", 'stick = "message"', True),
    ):
        made = router_of_routes(every.format(primary=primary, more=more))
        assert (made.plan("a", "x@example.org", "10.0.0.1", token="1").settled is not None) is is_settled, primary
        assert made.plan("a", "x@example.org", "192.0.2.1").settled is not None


# --- properties -----------------------------------------------------------------------------------------------------

ADDRESSES = st.builds(
    "{}@{}".format,
    st.sampled_from(["anna", "otto", "anna+x", "vip", '"a b"', "jürgen"]),
    st.sampled_from(["shop.example", "sub.shop.example", "example.com", "other.example", "[192.0.2.1]"]),
)


@functools.cache
def router_with_others() -> Router:
    everything = '[[route]]\nname = "all"\nservers = ["a", "b", "c"]\ncopies = "others"\nmatch = { recipients = "*" }\n'
    return router_of_routes(ORDER + everything)


@settings(max_examples=300, deadline=None)
@given(st.lists(ADDRESSES, min_size=1, max_size=8, unique=True), st.sampled_from(["x@news.example", ""]))
def test_every_recipient_has_one_primary_and_the_servers_together_have_all(addresses: list[str], sender: str) -> None:
    """Whatever the recipients: transactions by primary partition them, and each route's servers get all of theirs."""
    plan = router_with_others().plan("a", sender, "192.0.2.1")
    decisions = [plan.decide(address) for address in addresses]
    assert decisions == [plan.decide(address) for address in addresses]
    by_primary: dict[str, list[int]] = {}
    for index, decision in enumerate(decisions):
        assert len(set(decision.servers)) == len(decision.servers) > 0
        by_primary.setdefault(decision.servers[0], []).append(index)
    assert sorted(i for indices in by_primary.values() for i in indices) == list(range(len(addresses)))
    for answered, indices in by_primary.items():
        found = owed([decisions[i] for i in indices], [answered] * len(indices), ["b"])
        assert answered not in found
        for place, index in enumerate(indices):
            route = decisions[index].route
            has = {answered, *(name for name, owns in found.items() if place in owns)}
            if route.copies == "others":
                assert has == set(route.servers)
            else:
                assert has == {answered, *(route.backups if route.name != "default" else ("b",))}


def test_taking_a_server_out_moves_only_its_own() -> None:
    """And a weight that grows only moves mailboxes to its server; shares are as the weights say."""
    keys = [f"user{n}@example.com" for n in range(4000)]
    names, weights = ("a", "b", "c"), (3.0, 1.0, 4.0)
    first = {key: by_weight(names, weights, key)[0] for key in keys}
    for name, weight in zip(names, weights, strict=True):
        share = sum(found == name for found in first.values()) / len(keys)
        assert abs(share - weight / 8) < 0.03
    without = {key: by_weight(("a", "c"), (3.0, 4.0), key)[0] for key in keys}
    assert all(without[key] == found for key, found in first.items() if found != "b")
    assert {without[key] for key, found in first.items() if found == "b"} == {"a", "c"}
    more = {key: by_weight(names, (3.0, 2.0, 4.0), key)[0] for key in keys}
    assert all(more[key] in {found, "b"} for key, found in first.items())
    assert all(by_weight(names, weights, key)[1] == without[key] for key, found in first.items() if found == "b")


# --- tables ---------------------------------------------------------------------------------------------------------


def test_values_name_servers_in_every_form() -> None:
    text = """\
one@example.com a
two@example.com B
three@example.com smtp:[b.example.net]
four@example.com relay:b.example.net:25
five@example.com b.example.net:25
six@example.com c, smtp:[a.example.net]:25
seven@example.com
"quoted one"@example.com  lmtp:c
# eight@example.com a
  # an indented comment
nine@example.com
\tsmtp:c.example.net
one@example.com c
"""
    rows = parse(text, SERVERS, fold=True)
    assert {key.partition("@")[0]: (row.servers, row.line) for key, row in rows.items()} == {
        "one": (("a",), 1), "two": (("b",), 2), "three": (("b",), 3), "four": (("b",), 4), "five": (("b",), 5),
        "six": (("c", "a"), 6), "seven": ((), 7), "quoted one": (("c",), 8), "nine": (("c",), 11),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("email;host;enabled\na@example.com;b;1\nb@example.com;b.example.net:25;0\n\nc@example.com;;yes\n",
         {"a@example.com": ("b",), "c@example.com": ()}),
        ("Domain\nexample.com\nbücher.example\n", {"@example.com": (), "@xn--bcher-kva.example": ()}),
        ('"user","server"\n"""a b""@example.com","c"\n', {"a b@example.com": ("c",)}),
        ("\ufeffkey,transport\r\n@example.com,smtp:[a.example.net]:25\r\n", {"@example.com": ("a",)}),
        ("", {}),
    ],
)  # fmt: skip
def test_csv(text: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert {key: row.servers for key, row in parse(text, SERVERS, fold=True).items()} == expected


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("a@example.com nowhere\n", ['line 1: a@example.com: "nowhere" is no server of the settings']),
        ("a@example.com b\n/^x/ b\nb@example.com error:no\n", ["line 2: /^x/: expected", "line 3: b@example.com: "]),
        ("email,server\na@example.com\n", ["line 2: it has 1 fields"]),
        ('email,server\n"a@example.com,b\n', ["line 2: no CSV"]),
        ("\n".join(f"x{n}@example.com nowhere" for n in range(100)), ["line 1: "] + ["line "] * 19 + ["and perhaps"]),
    ],
)
def test_a_bad_table_names_its_lines(text: str, faults: list[str]) -> None:
    with pytest.raises(BadTable) as caught:
        parse(text, SERVERS, fold=True)
    assert len(caught.value.faults) == len(faults)
    assert all(found.startswith(fault) for found, fault in zip(caught.value.faults, faults, strict=True))


def test_what_cannot_be_read_keeps_what_was_read(tmp_path: Path) -> None:
    """A file that vanishes, is no UTF-8 or has a fault changes nothing; as soon as it is right again it counts."""
    path = tmp_path / "table"

    def update() -> table_store.Note:
        return table_store.update(tmp_path / "state", path, SERVERS, fold=True)

    with pytest.raises(BadTable, match="No such file"):
        update()
    path.write_text("a@example.com b\n")
    first = update()
    for spoil in (path.unlink, lambda: path.write_bytes(b"\xff\n"), lambda: path.write_text("a@example.com nowhere\n")):
        spoil()
        for _ in range(2):
            with pytest.raises(BadTable):
                update()
        held = table_store.note(tmp_path / "state", path)
        assert held is not None
        assert (held.name, held.keys, bool(held.fault)) == (first.name, 1, True)
        assert table_store.Table.load(tmp_path / "state", path).find(["a@example.com"]) == ("a@example.com", ("b",))
    path.write_text("a@example.com c\n")
    assert update().fault == ""
    assert table_store.Table.load(tmp_path / "state", path).find(["a@example.com"]) == ("a@example.com", ("c",))
    assert len(list((tmp_path / "state" / "tables").glob("*.db"))) <= 2


def test_damaged_notes_and_files_are_read_anew(tmp_path: Path) -> None:
    """What stands in the state folder is data: nonsense there is read again from the table's own file."""
    path, state = tmp_path / "table", tmp_path / "state"
    path.write_text("a@example.com b\n")
    made = table_store.update(state, path, SERVERS, fold=True)
    (note,) = (state / "tables").glob("*.json")
    whole = note.read_text()
    for text in (
        "",
        "[]",
        "{}",
        whole[:-9],
        whole.replace(made.name, "../x.db"),
        whole.replace('"keys": 1', '"keyz": 1'),
    ):
        note.write_text(text)
        assert table_store.note(state, path) is None
        assert table_store.update(state, path, SERVERS, fold=True) == made
    (state / "tables" / made.name).unlink()
    assert table_store.update(state, path, SERVERS, fold=True) == made
    (state / "tables" / made.name).write_bytes(random.randbytes(8192))
    with pytest.raises(OSError, match="table"):
        table_store.Table.load(state, path)


def test_a_route_that_is_hidden_is_a_fault() -> None:
    """Wholly by one earlier route; a part that is left makes it none."""
    route = '[[route]]\nname = "{}"\nprimary = "b"\nmatch = {{ {} }}\n'

    def faults(*matches: str) -> list[str]:
        try:
            loaded("".join(route.format(f"r{n}", match) for n, match in enumerate(matches)))
        except SettingsError as error:
            return [problem.text for problem in error.problems]
        return []

    for earlier, later in (
        ("", 'recipients = "a@x.example"'),
        ('recipients = "@x.example"', 'recipients = ["a@x.example", "b@x.example"]'),
        ('recipients = "@.example"', 'recipients = ["a@x.example", "@.y.example"]'),
        ('recipients = "*"', 'recipients = "@x.example", senders = "@y.example"'),
        ('clients = "10.0.0.0/8"', 'clients = ["10.1.0.0/16", "10.2.0.0/16"]'),
        ('senders = "a@x.example"', 'senders = "a+tag@x.example"'),
    ):
        assert faults(earlier, later) == ["never matches: r0 above it takes all that it would"], (earlier, later)
        assert faults(later, earlier) == []
    assert faults('recipients = "@x.example"', 'recipients = ["a@x.example", "b@y.example"]') == []
    assert faults('clients = "10.0.0.0/8"', 'clients = ["10.1.0.0/16", "192.0.2.0/24"]') == []
    assert faults('recipients = "@.x.example"', 'recipients = "@x.example"') == []
