"""The job types that clients may submit now, as this process knows them, and their payload schemas.

Nodes publish types in the database. They are read once a second off the request path; a type that is
unknown makes one read at once, so that a new type can be submitted as soon as it is published.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from taskd.errors import FieldProblem, Refused, StoreUnavailable
from taskd.model.jobtype import TypeInfo
from taskd.service.backlog import Backlog
from taskd.service.batch import Reads
from taskd.store import types as rows
from taskd.store.types import KnownType

log = logging.getLogger("taskd.service")

EVERY_S = 1.0
"""How often the types are read, and how far apart reads for unknown types are, in seconds."""
MOST_PROBLEMS = 20
"""Problems of a payload that one answer lists."""

_MASK = "it"
"""Stands for the value in the messages of the validator: a payload may hold secrets."""


@dataclass(frozen=True, slots=True)
class Offered:
    """A type as the door sees it: the newest publication and the validators of the schemas in force."""

    known: KnownType
    validators: Sequence[Any]
    """Of the live nodes; of the newest publication when no node is live. Any of them may accept."""
    max_backlog: int
    """How many jobs may wait: by the strictest of the live nodes, else by the newest publication."""

    @property
    def info(self) -> TypeInfo:
        """The newest publication: it decides the defaults."""
        return self.known.info

    @property
    def submittable(self) -> bool:
        """Whether clients may submit it."""
        return self.info.enabled and not self.known.retired

    @property
    def served(self) -> bool:
        """Whether a live node runs it."""
        return bool(self.known.live)

    def check(self, payload: Mapping[str, Any]) -> None:
        """Return when a schema in force accepts `payload`.

        Raises:
            Refused: `invalid_payload`, with every problem that the first schema finds, up to 20.
        """
        for validator in self.validators:
            if validator.is_valid(payload):
                return
        if self.validators:
            refuse_payload(self.validators[0].iter_errors(payload))


class KnownTypes:
    """The types by name; owned by the task that `run` is, and renewed by requests for unknown types."""

    def __init__(self, reads: Reads, backlog: Backlog | None = None) -> None:
        """`backlog` refuses what would wait beyond the bound of its type; None refuses nothing."""
        self._reads = reads
        self._backlog = backlog
        self._types: dict[str, Offered] | None = None
        self._schemas: dict[str, Any] = {}
        self._read_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Read the types every second until cancelled; outages are waited for."""
        while True:
            try:
                await self._read(asyncio.get_running_loop().time() + 5.0)
            except StoreUnavailable:
                pass  # /ready says it; the types known last stay
            except Exception:  # an edge: one broken publication must not end the reading
                log.exception("the job types can't be read")
            await asyncio.sleep(EVERY_S)

    async def get(self, name: str, until: float) -> Offered:
        """Return a type of which a job may be submitted now.

        Raises:
            Refused: `unknown_type`, `not_ready` when nothing was ever published, or `backlog_full`.
            StoreUnavailable: the types were never read, and can't be until `until`.
        """
        types: Mapping[str, Offered] | None = self._types
        found = types.get(name) if types else None
        if found is None and (not types or self._may_read()):
            types = await self._renewed(until)
            found = types.get(name)
        if found is not None and found.submittable:
            if self._backlog is not None:
                await self._backlog.admit_type(name, found.max_backlog, until)
            return found
        if not types:
            raise Refused(
                "not_ready",
                "no job types were ever published: start a worker or run `taskd types publish`",
                headers={"Retry-After": "1"},
            )
        raise Refused.field("unknown_type", "type", f"{json.dumps(name)} is no job type here")

    def secrets(self, name: str) -> tuple[str, ...]:
        """Return the payload members of a type that are masked where people look; none if it is unknown."""
        found = self._types.get(name) if self._types else None
        return () if found is None else found.info.secrets

    def _may_read(self) -> bool:
        return asyncio.get_running_loop().time() - self._read_at >= EVERY_S

    async def _renewed(self, until: float) -> Mapping[str, Offered]:
        if self._reading is None or self._reading.done():
            if self._types is not None and not self._may_read():
                return self._types
            self._reading = asyncio.get_running_loop().create_task(self._read(until))
            self._reading.add_done_callback(_looked_at)
        await asyncio.wait({self._reading}, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        if self._types is None:
            raise StoreUnavailable("the job types could not be read")
        return self._types

    async def _read(self, until: float) -> None:
        self._read_at = asyncio.get_running_loop().time()
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
