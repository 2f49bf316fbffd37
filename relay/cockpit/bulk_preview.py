"""What a word would do to many copies: how many, how large, why they are there, some examples.

It keeps the ids, 16 octets each, and the times in their lists: what was agreed to is done, and nothing that came later.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache

from redis import Redis

from relay.cockpit.formatting import address
from relay.mail.reply import Reply
from relay.mail.reply_text import Known, normalise
from relay.mail.text import printable
from workers.queues import backlog, failed
from workers.queues.backlog import WaitingCopy
from workers.queues.failed import FailedCopy
from workers.queues.selection import PAGE, WAITING, Page, Which

_EXAMPLES = 5
_REASONS = 10  # shown: the most frequent ones
_TOLD_APART = 10_000  # reasons; a server may put anything into its replies
_ID = 16
_CODE = re.compile(r"([2-5]\d\d)(?:[ -]|$)")


class BulkPreview:
    """The copies that a word is about, counted; the first few as rows."""

    def __init__(self, connection: Redis, which: Which) -> None:
        self._connection = connection
        self._which = which
        self._ids: defaultdict[str, bytearray] = defaultdict(bytearray)
        self._scores: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.count = self.octets = self.looked_at = 0
        self.reasons: Counter[str] = Counter()
        self.examples: list[WaitingCopy | FailedCopy] = []

    def add(self, page: Page) -> None:
        """Take a page that was read whole."""
        self.looked_at += page.looked_at
        self.count += len(page.found)
        name = page.target.name
        waits = self._which is WAITING
        for copy in page.found:
            self._ids[name] += copy.id.encode("ascii")
            self._scores[name].append(copy.score)
            self.octets += copy.envelope.size if copy.envelope else 0
            reason = reason_of(copy.state.last_reply or (page.health.reason if waits else "")) or "not tried yet"
            if reason not in self.reasons and len(self.reasons) >= _TOLD_APART:
                reason = "other reasons"
            self.reasons[reason] += 1
        if page.found and len(self.examples) < _EXAMPLES:
            few = page._replace(found=page.found[: _EXAMPLES - len(self.examples)])
            self.examples += backlog.rows(self._connection, few) if waits else failed.rows(few)

    def batches(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield what was counted, by destination and in pages: id -> its time in the list."""
        for name, octets in self._ids.items():
            for start in range(0, len(octets) // _ID, PAGE):
                text = octets[start * _ID : (start + PAGE) * _ID].decode("ascii")
                ids = [text[n : n + _ID] for n in range(0, len(text), _ID)]
                yield name, dict(zip(ids, self._scores[name][start : start + PAGE], strict=True))

    def common_reasons(self) -> list[tuple[str, int]]:
        """Return why they are there, the most frequent reasons first, and under "other reasons" the rest."""
        shown = self.reasons.most_common(_REASONS)
        rest = self.count - sum(count for _, count in shown)
        return [*shown, *([("other reasons", rest)] if rest else [])]

    def lines(self) -> Iterator[str]:
        """Yield why they are there, and some of them."""
        if len(self.reasons) > 1 or self.count > _EXAMPLES:
            for reason, count in self.common_reasons():
                yield printable(f"  {count:>8}  {reason}")
        for row in self.examples:
            yield printable(f"  {row.id}  {row.destination}  {address(row.sender)} to {', '.join(row.recipients)}")
        if self.count > len(self.examples):
            yield f"  and {self.count - len(self.examples)} more"


def copies(count: int) -> str:
    """Return a number of copies in words."""
    return "1 copy" if count == 1 else f"{count} copies"


@lru_cache(maxsize=4096)
def reason_of(reply: str) -> str:
    """Return a reply without what is of one message only: addresses, ids, numbers."""
    found = _CODE.match(reply)
    said = normalise(Reply.of(0, reply[found.end() :] if found else reply), Known())
    return " ".join(filter(None, (found[1] if found else "", said.status, said.text)))
