"""The audit log as operators read it: who did what, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskd.service.batch import Reads
from taskd.store import audit as rows
from taskd.store.audit import Entry


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Some entries; `before` is where the next page begins, None when there is none."""

    entries: Sequence[Entry]
    before: int | None


class Audit:
    """Reads the log. Whoever changes something writes its entry in the transaction of the change."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    async def page(self, *, before: int | None, limit: int, until: float) -> AuditPage:
        """Return up to `limit` entries, newest first, of those with an id below `before`.

        Raises:
            StoreUnavailable: no answer until `until`, by the loop's clock.
        """
        found = await self._reads.run(lambda conn: rows.page(conn, before=before, limit=limit + 1), until)
        if len(found) <= limit:
            return AuditPage(found, None)
        return AuditPage(found[:limit], found[limit - 1].id)
