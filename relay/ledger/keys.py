"""Every Redis key of the ledger: a wire format. Other modules of the ledger add, read and remove what is below them."""

from __future__ import annotations

PREFIX = "smtpdup:"
MESSAGE = PREFIX + "message:"  # string: the packed Message
STAGED = PREFIX + "staged"  # zset id -> the owner's deadline
UNCERTAIN = PREFIX + "uncertain"  # zset id -> when its copies go out all the same
TWINS = PREFIX + "twins"  # hash digest -> ids of uncertain messages, separated by spaces
COVERED = PREFIX + "covered"  # hash uncertain id -> JSON list of addresses that a twin has served
PENDING = PREFIX + "pending:"  # zset id -> time accepted (or retried by an operator)
OWN = PREFIX + "own:"  # hash id -> CopyState, only copies with a history
BUSY = PREFIX + "busy:"  # zset id -> end of the lease
HOLDERS = PREFIX + "holders:"  # hash id -> the worker that holds the lease, and perhaps whom it took that over from
FAILED = PREFIX + "failed:"  # zset id -> time failed
FAILURE = PREFIX + "failure:"  # hash id -> CopyState of what failed
DESTINATIONS = PREFIX + "destinations"  # hash name -> Destination, every one ever used
HEALTH = PREFIX + "health:"  # hash: the breaker as the worker sees it, and the operator's flush
# What a backup answered otherwise than the primary, see divergence.py; a group is 12 hex digits, or "other".
DIVERGENCE = PREFIX + "divergence:"  # zset group -> last seen
DIVERGED = PREFIX + "diverged:"  # "<destination>:<group>": hash of one group
EXAMPLES = PREFIX + "examples:"  # likewise: zset id -> when, the first and the last
WHOM = PREFIX + "whom:"  # likewise: zset recipient -> count; where mail is sealed, a pseudonym
SEALED = PREFIX + "sealed:"  # likewise: hash pseudonym -> the sealed address
DOMAINS = PREFIX + "domains:"  # hash domain -> "ok,deferred,refused,last"
OUTAGES = PREFIX + "outages:"  # list of JSON: begin, end, reason; the last one first
COUNTERS = PREFIX + "counters"  # hash name -> total
OWNERS = PREFIX + "owners"  # hash owner -> "host state-dir process" of a relay process, and a line with its instance
RECONCILER = PREFIX + "reconciler"  # lock of the reconciler
IMPORTED = PREFIX + "imported:"  # zset id, or "file backup" -> when: came from one spool, its file may still be there
MOVED = PREFIX + "moved:"  # set of ids whose bodies are files in one folder, by its identity, until the files are gone
# set of all destinations that a list is of, named by whatever puts something in a list; and "", once it is whole, which
# a Redis that came back empty, or that an older version has filled, does not have. Until then no body is deleted.
LISTS = PREFIX + "lists"
KEPT = PREFIX + "kept"  # set of ids whose bodies would have been deleted, had LISTS been whole
LEDGER = PREFIX + "ledger"  # hash: who this ledger is, and how far it has come; see continuity.py
AUDIT = PREFIX + "audit"  # stream: what operators did; see audit.py
TOPOLOGY = PREFIX + "topology"  # string: JSON, who is primary now; none until somebody promotes
INTENT = PREFIX + "intent"  # string with an end: JSON, the promotion that is being prepared
RELAYS = PREFIX + "relays"  # hash relay process -> JSON, its last sign of life
# hash field -> number: what all hosts saw in the ten seconds, the minute or the hour (UTC) that the key names, as in
# 2026-11-27T16:11:20, 2026-11-27T16:11 and 2026-11-27T16; see flow.py for the fields
FLOW = PREFIX + "flow:"
FLOW_BASE = PREFIX + "flow-base:"  # string: what one installation has added so far, by its identity
EHLO = PREFIX + "ehlo:"  # string: JSON, what a server last said to EHLO
HOSTS = PREFIX + "hosts"  # hash place -> JSON: which processes a host runs, what its spool holds, when it said so
REACH = PREFIX + "reach"  # hash "destination place" -> JSON: what came of the last connection from that host
EVENTS = PREFIX + "events"  # list of JSON, newest first: the last events of mail that are no success
