"""The job types that clients may submit now, as this process knows them, and their payload schemas.

Nodes publish types in the database. They are read once a second off the request path for as long as
somebody asks, and not at all while nobody does: the first request after that waits for a read. A request
for a type that is unknown waits for a read that began after it came, too, so that a type can be submitted
as soon as it is published; all that wait share one read, and there are ten a second at most.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonschema_rs

from taskd.errors import FieldProblem, Refused, StoreUnavailable
from taskd.model.jobtype import TypeInfo
from taskd.service.backlog import Backlog
from taskd.service.batch import Reads, left_s
from taskd.store import types as rows
from taskd.store.types import KnownType

log = logging.getLogger("taskd.service")

EVERY_S = 1.0
"""How often the types are read while they are asked for, in seconds."""
AWAKE_S = 10.0
"""For how long after the last question they are, in seconds: who submits now and then waits for no read."""
UNKNOWN_S = 0.1
"""How far apart reads for unknown types are at least, in seconds."""
PATIENCE_S = 5.0
"""How long one read may take, in seconds."""
MOST_PROBLEMS = 20
"""Problems of a payload that one answer lists."""

_MASK = "it"
"""Stands for the value in the messages of the validator: a payload may hold secrets."""


class Offered:
    """A type as the door sees it: the newest publication and the validators of the schemas in force."""

    __slots__ = ("info", "max_backlog", "served", "submittable", "validators")

    def __init__(self, known: KnownType, validators: Sequence[Any], max_backlog: int) -> None:
        self.info: TypeInfo = known.info
        """The newest publication: it decides the defaults."""
        self.validators = validators
        """Of the live nodes; of the newest publication when no node is live. Any of them may accept."""
        self.max_backlog = max_backlog
        """How many jobs may wait: by the strictest of the live nodes, else by the newest publication."""
        self.submittable = known.info.enabled and not known.retired
        """Whether clients may submit it."""
        self.served = bool(known.live)
        """Whether a live node runs it."""

    def check(self, payload: Mapping[str, Any], path: str = "") -> None:
        """Return when a schema in force accepts `payload`; `path` stands before it in problems.

        Raises:
            Refused: `invalid_payload`, with every problem that the first schema finds, up to 20.
        """
        for validator in self.validators:
            if validator.is_valid(payload):
                return
        if self.validators:
            refuse_payload(self.validators[0].iter_errors(payload), f"{path}payload")


class KnownTypes:
    """The types by name; owned by the task that `run` is, and renewed by requests for unknown types."""

    def __init__(self, reads: Reads, backlog: Backlog | None = None) -> None:
        """`backlog` refuses what would wait beyond the bound of its type; None refuses nothing."""
        self._reads = reads
        self._backlog = backlog
        self._types: dict[str, Offered] | None = None
        self._schemas: dict[str, Any] = {}
        self._read_at = float("-inf")
        self._next: asyncio.Task[None] | None = None
        """A read that has not begun yet: whoever asks now learns all that was published before."""
        self._asked = asyncio.Event()
        """Set by every request since `run` has read last."""
        self._known_at = float("-inf")
        """When the read began that what is known comes from, by the loop's clock."""
        self._asleep = False
        """Whether `run` has stopped reading because nobody asks."""

    async def run(self) -> None:
        """Read the types every second while somebody asks, until cancelled; outages are waited for."""
        quiet_s = AWAKE_S  # nobody has asked yet
        while True:
            self._asked.clear()
            try:
                await self._read(asyncio.get_running_loop().time() + PATIENCE_S)
            except StoreUnavailable:
                pass  # /ready says it; the types known last stay
            except Exception:  # an edge: one broken publication must not end the reading
                log.exception("the job types can't be read")
            await asyncio.sleep(EVERY_S)
            quiet_s = 0.0 if self._asked.is_set() else quiet_s + EVERY_S
            if quiet_s >= AWAKE_S:
                self._asleep = True
                await self._asked.wait()  # whoever asks first reads them
                await asyncio.sleep(EVERY_S)
                self._asleep = False  # in an outage what is known must do again
                quiet_s = 0.0

    async def awake(self, until: float) -> None:
        """Return when what is known is about a second old at most, or can't be read.

        Raises:
            StoreUnavailable: nobody has asked for a while, and there was no answer until `until`.
        """
        self._asked.set()
        if self._stale:
            await self._fresh(until)

    @property
    def _stale(self) -> bool:
        return self._asleep and asyncio.get_running_loop().time() - self._known_at > EVERY_S

    async def get(self, name: str, until: float) -> Offered:
        """Return a type of which a job may be submitted now.

        Raises:
            Refused: `unknown_type`, `not_ready` when nothing was ever published, or `backlog_full`.
            StoreUnavailable: the types had to be read, and could not be until `until`.
        """
        found = await self.find(name, until)
        await self.admit(found, until)
        return found

    def known(self, name: str) -> Offered | None:
        """Return a type that may be submitted, if it can be said without reading."""
        self._asked.set()
        found = self._types.get(name) if self._types and not self._stale else None
        return found if found is not None and found.submittable else None

    async def find(self, name: str, until: float, path: str = "") -> Offered:
        """Return a type that may be submitted, however many wait; `path` stands before `type` in problems.

        Raises:
            Refused, StoreUnavailable: as `get`.
        """
        found = self.known(name)
        if found is None:
            types = await self._fresh(until)
            found = types.get(name)
            if not types:
                raise Refused(
                    "not_ready",
                    "no job types were ever published: start a worker or run `taskd types publish`",
                    headers={"Retry-After": "1"},
                )
            if found is None or not found.submittable:
                raise Refused.field("unknown_type", f"{path}type", f"{json.dumps(name)} is no job type here")
        return found

    def has_room(self, offered: Offered) -> bool:
        """Admit one more job of the type if that can be said without counting; whether it could."""
        backlog = self._backlog
        return backlog is None or backlog.has_room(offered.info.name, offered.max_backlog)

    async def admit(self, offered: Offered, until: float, *, jobs: int = 1) -> None:
        """Return when `jobs` more jobs of the type may wait.

        Raises:
            Refused: `backlog_full`.
            StoreUnavailable: they had to be counted, and there was no answer until `until`.
        """
        if self._backlog is not None:
            await self._backlog.admit_type(offered.info.name, offered.max_backlog, until, jobs=jobs)

    def secrets(self, name: str) -> tuple[str, ...]:
        """Return the payload members of a type that are masked where people look; none if it is unknown.

        As the types were when they were read last: `awake` first.
        """
        found = self._types.get(name) if self._types else None
        return () if found is None else found.info.secrets

    async def _fresh(self, until: float) -> Mapping[str, Offered]:
        """Return the types by a read that begins from now on."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._read_soon())
            self._next.add_done_callback(_looked_at)
        reading = self._next
        await asyncio.wait({reading}, timeout=left_s(until))
        if not reading.done() or reading.exception() is not None or self._types is None:
            raise StoreUnavailable("the job types could not be read")
        return self._types

    async def _read_soon(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._read_at + UNKNOWN_S - loop.time()))
        self._next = None  # whoever asks from now on may want more than this read finds
        await self._read(loop.time() + PATIENCE_S)

    async def _read(self, until: float) -> None:
        self._read_at = began_at = asyncio.get_running_loop().time()
        known = await self._reads.run(rows.known, until)
        schemas: dict[str, Any] = {}
        types: dict[str, Offered] = {}
        for one in known:
            infos = one.live or (one.info,)
            validators = [self._validator(info, schemas) for info in infos]
            unique = list({id(validator): validator for validator in validators if validator}.values())
            types[one.info.name] = Offered(one, unique, min(info.max_backlog for info in infos))
        self._schemas = schemas
        self._types = types
        self._known_at = began_at

    def _validator(self, info: TypeInfo, schemas: dict[str, Any]) -> Any:
        """Return the validator of a schema, made only when the schema is new; None for one that is broken."""
        text = json.dumps(info.schema, sort_keys=True)
        if text not in schemas:
            if text in self._schemas:
                schemas[text] = self._schemas[text]
            else:
                try:
                    schemas[text] = jsonschema_rs.validator_for(
                        info.schema, mask=_MASK, retriever=_refuse_to_fetch
                    )
                except ValueError as error:
                    log.error("a published schema is broken", extra={"type": info.name, "error": str(error)})
                    schemas[text] = None
        return schemas[text]


def refuse_payload(errors: Iterable[Any], path: str = "payload") -> None:
    """Raise `Refused` with the problems of a payload, each named by its path below `path`."""
    problems: list[FieldProblem] = []
    for error in errors:
        if len(problems) >= MOST_PROBLEMS:
            break
        where = path + "".join(_step(step) for step in error.instance_path)
        kind = error.kind.name
        if kind == "required":
            problems.append(FieldProblem(where + _step(error.kind.property), "is required"))
        elif kind == "additionalProperties":
            for member in error.kind.unexpected[: MOST_PROBLEMS - len(problems)]:
                problems.append(FieldProblem(where + _step(member), "is no member of this payload"))
        else:
            problems.append(FieldProblem(where, error.message[:300]))
    first = problems[0]
    raise Refused("invalid_payload", f"{first.path}: {first.problem}", fields=problems)


def _step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    plain = step.isascii() and step.replace("_", "a").replace("-", "a").isalnum() and len(step) <= 64
    return f".{step}" if plain else f".{json.dumps(step[:64])}"


def _refuse_to_fetch(uri: str) -> Any:
    """Keep the validator from fetching a `$ref` over the network: a schema stands for itself."""
    raise ValueError(f"a schema can't refer to {uri[:100]}")


def _looked_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
