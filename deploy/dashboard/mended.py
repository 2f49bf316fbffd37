"""rq-dashboard 0.9.0 with its faults mended from outside, for queues whose jobs are JSON.

Found by running it against queues of smtp-dup: it reads some jobs as pickle (Workers tab, job page, requeue), puts
server replies into its job page as HTML, has no Requeue button for a job that was written as failed, shows jobs
twice or not at all from page to page, says of a job without a result that it failed just now, shows jobs and not
messages, lets wide tables leave their box, raises the Redis timeouts of the whole process to minutes, and answers 500
where a job has just gone or Redis is away. Deleting a job here would only hide it, since the ledger of smtp-dup is
the truth; so the buttons that delete are off, and `smtp-dup failed drop` drops.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from flask import Flask, Response, g
from jinja2 import BaseLoader, Environment
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, Worker, requeue_job
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer
from rq_dashboard import web
from rq_dashboard.cli import make_flask_app

_REGISTRIES: dict[str, type[BaseRegistry]] = {
    "canceled": CanceledJobRegistry,
    "deferred": DeferredJobRegistry,
    "failed": FailedJobRegistry,
    "finished": FinishedJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "started": StartedJobRegistry,
}


def make_app(client: Redis, redis_url: str, page_url: str = "") -> Flask:
    """Return the application on this Redis, with a link to the page of smtp-dup.

    It shows ``redis_url`` without its password.
    """
    web.config.serializer = JSONSerializer
    web.Job, web.Worker, web.requeue_job = _Job, _Worker, _requeue
    web.get_queue_registry_jobs_count = _page
    listed = web.serialize_queues
    web.serialize_queues = lambda number, queues: [
        row | _waiting(client, row["name"]) for row in listed(number, [q for q in queues if q.name.startswith(_QUEUE)])
    ]
    # For every request it would make a new client, for one thing without timeouts.
    web.from_url = lambda *_args, **_options: (None, client)
    app: Flask = make_flask_app(config=None, username=None, password=None, url_prefix="")
    app.config.update(RQ_DASHBOARD_REDIS_URL=(redis_url,), RQ_DASHBOARD_DISABLE_DELETE=True, DEPRECATED_OPTIONS=[])
    web.setup_rq_connection(app)
    app.view_functions["rq_dashboard.requeue_all"] = web.jsonify(lambda queue_name: _requeue_all(client, queue_name))
    if app.jinja_loader:
        app.jinja_env.loader = _Escaping(app.jinja_env.loader or app.jinja_loader)
    app.context_processor(lambda: {"script_nonce": _nonce(), "page_url": page_url})
    app.after_request(_harden)
    for error, status, text in (
        (RedisError, 503, "Redis does not answer"),
        (NoSuchJobError, 404, "there is no such job any more"),
        (InvalidJobOperation, 409, "the job is not in the failed list any more"),
        (LookupError, 404, "not found"),
    ):
        app.register_error_handler(error, _tell(status, text))
    return app


def _tell(status: int, text: str) -> Callable[[Exception], Response]:
    return lambda _error: Response(f"{text}\n", status, mimetype="text/plain")


# What waits ---------------------------------------------------------------------------------------------------

_QUEUE = "backup-"  # and the destination's name
_LEDGER = "smtpdup:"  # the prefix of the ledger's keys


def _waiting(client: Redis, queue_name: str) -> dict[str, Any]:
    """Return how many messages wait for a queue's destination and are on its failed list, and whether it is paused."""
    name = queue_name.removeprefix(_QUEUE)
    with client.pipeline(transaction=False) as pipe:
        pipe.zcard(f"{_LEDGER}pending:{name}")
        pipe.zcard(f"{_LEDGER}failed:{name}")
        pipe.hgetall(f"{_LEDGER}health:{name}")
        pending, failed, health = pipe.execute()
    state = "delivering" if pending else "idle"
    if health.get(b"state") == b"paused":
        probe = _clock(health.get(b"probe_at", b""))
        reason = health.get(b"reason", b"").decode("utf-8", "replace")
        state = f"paused: {reason}" + (f"; next probe {probe}" if probe else "")
    return {"pending": pending, "refused": failed, "state": state}


def _clock(seconds: bytes | float) -> str:
    try:
        return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return ""


# Jobs are JSON ------------------------------------------------------------------------------------------------


class _Job(Job):
    """A job that is read as JSON where rq-dashboard names no serializer."""

    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:  # noqa: A002 - RQ's
        super().__init__(id, connection=connection, serializer=serializer or JSONSerializer)

    def latest_result(self, timeout: int = 0) -> Result | None:
        """Return the newest result, or what stands for it in a job that was written as failed: the server's reply."""
        found = super().latest_result(timeout)
        if found is None and self._exc_info:  # without it the list shows no reply and no Requeue button
            return Result(self.id, Result.Type.FAILED, self.connection, id="own", exc_string=self._exc_info)
        return found

    def get_call_string(self) -> str:
        return self.description or ""  # the whole call has up to a hundred ids


class _Worker(Worker):
    """A worker as the Workers tab reads it."""

    @classmethod
    def all(cls, connection: Redis | None = None, **_options: Any) -> list[Any]:
        return super().all(connection=connection, job_class=_Job, serializer=JSONSerializer)

    def _set_connection(self, connection: Redis) -> Redis:
        return connection  # a worker's longer timeouts would be put on everybody's connections

    def get_current_job(self) -> Job | None:
        try:
            return super().get_current_job()
        except NoSuchJobError:  # it has just ended
            return None


def _requeue(job_id: str, connection: Redis) -> Job:
    return requeue_job(job_id, connection=connection, serializer=JSONSerializer)


def _requeue_all(client: Redis, queue_name: str) -> dict[str, Any]:
    count = 0
    for job_id in Queue(queue_name, connection=client).failed_job_registry.get_job_ids(cleanup=False):
        try:
            _requeue(job_id, client)
            count += 1
        except (NoSuchJobError, InvalidJobOperation):  # gone or requeued meanwhile; the others count
            continue
    return {"status": "OK", "count": count}


def _page(
    queue_name: str, registry_name: str, offset: int, per_page: int, order: str, connection: Redis
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many jobs there are and those of one page. Raises LookupError for a registry that is none."""
    queue = Queue(queue_name, connection=connection, serializer=JSONSerializer)
    registry = None if registry_name == "queued" else _REGISTRIES[registry_name](queue_name, connection=connection)
    total = registry.get_job_count(cleanup=False) if registry is not None else queue.count
    first, last = max(offset, 0), min(max(offset, 0) + max(per_page, 1), total)
    if order == "dsc":
        first, last = max(total - last, 0), total - first
    ids: list[str] = []
    if last > first and registry is not None:
        ids = registry.get_job_ids(first, last - 1, cleanup=False)  # both inclusive
    elif last > first:
        ids = queue.get_job_ids(first, last - first)
    jobs = _Job.fetch_many(ids, connection=connection, serializer=JSONSerializer)
    if order == "dsc":
        jobs.reverse()
    times = _times(registry, ids) if registry_name == "scheduled" else {}
    return total, [_row(job, times.get(job.id, "")) for job in jobs if job]


def _times(registry: BaseRegistry | None, ids: Sequence[str]) -> dict[str, str]:
    """Return the time of the next try by the job's id."""
    if registry is None or not ids:
        return {}
    scores: Any = registry.connection.zmscore(registry.key, list(ids))
    return {job_id: _clock(score) for job_id, score in zip(ids, scores, strict=True) if score is not None}


def _row(job: Job, next_try: str) -> dict[str, Any]:
    row: dict[str, Any] = web.serialize_job(job)
    if next_try:
        row["description"] = f"{row['description']}; next try {next_try}"
    if row["ended_at"] is None:  # its page would take that for now; a job written as failed by 0.1.0 has no end
        row["ended_at"] = row["created_at"]
    return row


# Pages --------------------------------------------------------------------------------------------------------


_STYLE = """<style>
.container { max-width: 96rem; width: auto; margin-top: 1rem }
.section { overflow-x: auto; padding: 1rem }
.input-group { flex-wrap: wrap }
table#jobs, table#queues { width: 100% }
table#jobs td { overflow-wrap: anywhere }
table#queues td:first-child, table#jobs th { white-space: nowrap }
p.fixed.intro { height: auto }
table#queues td.state { min-width: 14rem; overflow-wrap: anywhere }
pre.exc_info { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 0 }
span.description.ellipsify { white-space: normal; max-width: none; display: inline }
</style>
"""
_QUEUES = """A queue for each backup: the messages that wait for it and those that it refused. A job carries up to a
hundred of the messages that wait; each refused message is a failed job."""
_HEADINGS = """<th class="narrow">Waiting messages</th><th class="narrow">Refused messages</th><th>State</th>
<th class="narrow">Queued jobs</th>"""
_CELLS = """<td class="narrow"><%= d.pending %></td><td class="narrow"><%= d.refused %></td>
<td class="state"><%= d.state %></td><td class="narrow"> <a href="<%= d.queued_url %>">"""
_LINK = (
    """{% if page_url %}<li class="nav-item"><a href="{{ page_url }}" class="nav-link">smtp-dup</a></li>{% endif %}"""
)

# By template: what it has, as a regular expression, and what ours has there. With another rq-dashboard than that of
# requirements.txt a page may keep its own words.
_CHANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "base.html": (("</head>", _STYLE + "</head>"), ("<title>RQ dashboard</title>", "<title>smtp-dup</title>")),
    "navbar.html": ((r"</ul>", _LINK + "</ul>"),),
    "queues.html": (
        (r"This list below contains all the registered queues[^<]*", _QUEUES),
        (r'<th class="narrow">Queued&nbsp;jobs</th>', _HEADINGS),
        (r"&nbsp;jobs</th>", " jobs</th>"),
        (r'<td class="narrow"> <a href="<%= d\.queued_url %>">', _CELLS),
        (r'<td colspan="6">Loading', '<td colspan="11">Loading'),
        (r'<td colspan="6">No queues\.', '<td colspan="11">No queues: no backup has had mail yet.'),
    ),
    "jobs.html": (
        (r"This list below contains all the queued jobs on queue", "The {{ registry_name }} jobs of"),
        (r"<th>Age</th>", "<th>Received</th>"),
    ),
}


class _Escaping(BaseLoader):
    """Its templates, but for three things: what they show is text, their scripts carry the nonce, and _CHANGES.

    ``<%= d.x %>`` of underscore.js writes HTML, and d.exc_info is what some mail server said about an address
    that some sender made up. ``<%- d.x %>`` writes text.
    """

    def __init__(self, loader: BaseLoader) -> None:
        self._loader = loader

    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Callable[[], bool] | None]:
        source, filename, is_current = self._loader.get_source(environment, template)
        for theirs, ours in _CHANGES.get(template.rpartition("/")[2], ()):
            source = re.sub(theirs, lambda _found, ours=ours: ours, source)
        source = re.sub(r"<%=(?=\s*(?:d\.|JSON\.|jobId|url_for|url\b|number\b))", "<%-", source)
        source = re.sub(r"<script(?=[\s>])", '<script nonce="{{ script_nonce }}"', source)
        return source, filename, is_current


def _nonce() -> str:
    if "script_nonce" not in g:
        g.script_nonce = secrets.token_urlsafe(16)
    nonce: str = g.script_nonce
    return nonce


def _harden(response: Response) -> Response:
    """Say to the browser what pages may do: run our scripts (underscore.js needs eval) and talk to us."""
    response.headers["Content-Security-Policy"] = (
        f"default-src 'self'; script-src 'nonce-{_nonce()}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    return response
