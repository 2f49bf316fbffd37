"""Every Redis key of the ledger: a stored form that other versions rely on. Only relay/ledger uses them directly."""

from __future__ import annotations

PREFIX = "smtpdup:"
MESSAGE = PREFIX + "message:"  # string: the packed Message
STAGED = PREFIX + "staged"  # zset id -> the owner's deadline
UNCERTAIN = PREFIX + "uncertain"  # zset id -> when its copies are delivered anyway
TWINS = PREFIX + "twins"  # hash digest -> ids of uncertain messages, separated by spaces
COVERED = PREFIX + "covered"  # hash uncertain id -> JSON lists of addresses that an accepted twin covers
PENDING = PREFIX + "pending:"  # zset id -> time accepted (or retried by an operator)
OWN = PREFIX + "own:"  # hash id -> CopyState, only copies with a history
BUSY = PREFIX + "busy:"  # zset id -> end of the lease
HOLDERS = PREFIX + "holders:"  # hash id -> the worker that holds the lease, and perhaps its previous holder
FAILED = PREFIX + "failed:"  # zset id -> time failed
FAILURE = PREFIX + "failure:"  # hash id -> CopyState of what failed
DESTINATIONS = PREFIX + "destinations"  # hash name -> Destination, every one ever used
HEALTH = PREFIX + "health:"  # hash: the breaker as the worker sees it; flush, hold and throttle. See health.py
THROTTLE = PREFIX + "throttle:"  # hash: what is left of this second, while a destination is throttled
THROTTLED = PREFIX + "throttled:"  # hash worker -> since when and when last: they share that
# Replies of a backup that differ from the primary's, see divergence.py; a group is 12 hex digits, or "other".
DIVERGENCE = PREFIX + "divergence:"  # zset group -> last seen
DIVERGED = PREFIX + "diverged:"  # "<destination>:<group>": hash of one group
EXAMPLES = PREFIX + "examples:"  # likewise: zset id -> when, the first and the last
WHOM = PREFIX + "whom:"  # likewise: zset recipient -> count; where mail is sealed, a pseudonym
SEALED = PREFIX + "sealed:"  # likewise: hash pseudonym -> the sealed address
DOMAINS = PREFIX + "domains:"  # hash domain -> "ok,deferred,refused,last"
OUTAGES = PREFIX + "outages:"  # list of JSON: begin, end, reason; the last one first
COUNTERS = PREFIX + "counters"  # hash name -> total
OWNERS = PREFIX + "owners"  # hash owner -> "host state-dir process" of a relay process, then a line with its instance
RECONCILER = PREFIX + "reconciler"  # lock of the reconciler
IMPORTED = PREFIX + "imported:"  # zset id, or "file backup" -> when: imported from a spool, the file may still exist
MOVED = PREFIX + "moved:"  # set of ids whose bodies are files in the folder of that identity, until they are deleted
# set of all destinations that have a list, added by every script that puts something in a list; and "" once it is
# complete, which it is not in a Redis that came back empty or was filled by an older version: then no body is deleted.
LISTS = PREFIX + "lists"
KEPT = PREFIX + "kept"  # set of ids whose bodies were not deleted because LISTS was incomplete
LEDGER = PREFIX + "ledger"  # hash: identity and count of this ledger; see continuity.py
AUDIT = PREFIX + "audit"  # stream: what operators did; see audit.py
TOPOLOGY = PREFIX + "topology"  # string: JSON, the current primary; missing until the first promotion
INTENT = PREFIX + "intent"  # string that expires: JSON, the promotion that is being prepared
MOVES = PREFIX + "moved"  # hash address or @domain -> JSON: the server that answers for it, see relay/topology/moved.py
MOVES_STATE = PREFIX + "moved-state"  # string: JSON, the generation of that map
MOVES_LOG = PREFIX + "moved-changes"  # list of JSON, newest first: what the last generations changed
RELAYS = PREFIX + "relays"  # hash relay process -> JSON, its last heartbeat
# hash field -> number: what all hosts saw in the ten seconds, the minute or the hour (UTC) that the key names, as in
# 2026-11-27T16:11:20, 2026-11-27T16:11 and 2026-11-27T16; see flow.py for the fields
FLOW = PREFIX + "flow:"
FLOW_BASE = PREFIX + "flow-base:"  # string: what one installation has added so far, by its identity
EHLO = PREFIX + "ehlo:"  # string: JSON, the last EHLO reply of a server
HOSTS = PREFIX + "hosts"  # hash place -> JSON: the processes of a host, the state of its spool, and when
REACH = PREFIX + "reach"  # hash "destination place" -> JSON: the result of the last connection from that host
PROBED = PREFIX + "probed:"  # hash what was asked, and the route -> JSON: what a probe has found; see probe_evidence.py
ASK = PREFIX + "ask:"  # list of JSON that expires: what a look-up in the trace asks the host of this place
ANSWER = PREFIX + "answer:"  # list of JSON that expires: what that host answers
ASIDE = PREFIX + "aside:"  # and the name of a key that was of another type; see misplaced.py
EVENTS = PREFIX + "events"  # list of JSON, newest first: the last mail events other than success
PAGE_SESSION = PREFIX + "page-session:"  # string that expires, by the digest of its token: JSON, see page_access.py
PAGE_LINK = PREFIX + "page-link:"  # likewise: a link of `smtp-dup open`, good once


def of_group(prefix: str, destination: str, group: str) -> str:
    """Return the key of one group of divergence; ``prefix``: DIVERGED, EXAMPLES, WHOM or SEALED."""
    return f"{prefix}{destination}:{group}"
