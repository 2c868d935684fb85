"""The rate limit of each key, exact over all processes and hosts.

One statement at a time takes tokens for all requests of all keys that wait. A key whose bucket is empty
is refused from memory until a token is due: a client that floods costs no statement.

A key with a large burst gets a few tokens ahead, so that its requests need not wait for a statement
each. Tokens in hand pass later than they were taken, on top of what the bucket has filled up with since;
so the bucket of such a key is counted smaller by what `HOLDERS` processes may hold together, and no
window ever sees more than burst + rate x T. They don't go bad: a client below its rate loses none.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass
from uuid import UUID

from taskd.api.http1 import DoorRequest
from taskd.errors import Refused, StoreUnavailable
from taskd.model.bucket import Limit, Taken
from taskd.service.batch import Batches, Ticket, pause, until_ready
from taskd.service.keyring import Key
from taskd.store import limits
from taskd.store.limits import Want
from taskd.store.pool import Link

MOST_SHUT = 100_000
"""Keys whose empty bucket is remembered; they leave when a token is due."""
MOST_HANDS = 10_000
"""Keys of which this process holds tokens; the one unused for longest loses them."""
HOLDERS = 128
"""API processes, over all hosts, that may hold tokens of one key without passing more than its limit."""
SPARED = 64
"""What they hold together is at most this part of the burst: a burst below 8192 has none in hand."""
MOST_HELD = 256


def in_hand(limit: Limit) -> int:
    """Return how many tokens one process may hold of a key; 0 for all but large bursts.

    >>> in_hand(Limit.of(50, 100)), in_hand(Limit.of(100_000, 1_000_000))
    (0, 122)
    """
    return min(limit.burst // (SPARED * HOLDERS), MOST_HELD)


def shared(limit: Limit) -> Limit:
    """Return the limit that the bucket in the database is held to."""
    held = in_hand(limit)
    return Limit(limit.micro_rate, limit.burst - held * HOLDERS) if held else limit


@dataclass(slots=True)
class _Hand:
    """Tokens of one key that were taken and not yet used, and what the bucket was like then."""

    limit: Limit
    single: Want
    """What a request asks for that finds nothing in hand: one object, so that those of a batch are told
    to be the same at a glance."""
    most: int
    """How many tokens may be in hand; 0 for all but large bursts."""
    tokens: int = 0
    remaining: int = 0
    reset_s: float = 0.0
    filling: bool = False


class Throttle:
    """Takes tokens for requests. Owned by one event loop."""

    def __init__(self, link: Link) -> None:
        self._shut: dict[UUID, tuple[float, float, Limit]] = {}
        self._hands: OrderedDict[UUID, _Hand] = OrderedDict()
        self._batches: Batches[Want, Taken] = Batches([link], self._take)

    async def take(
        self, key: Key, request: DoorRequest, until: float, tokens: int = 1, *, had: int = 0
    ) -> None:
        """Return when the request has its tokens; its answer then tells the state of the limit.

        `had` tokens it has taken before, and will need again if it comes again: so long is the wait.

        Raises:
            Refused: `rate_limited`.
            StoreUnavailable: no answer until `until`, by the loop's clock.
        """
        if self.from_hand(key, request, until, tokens):
            return
        shut = self._shut.get(key.id)
        if shut is not None:
            now = asyncio.get_running_loop().time()
            if shut[0] > now and shut[2] == key.limit:  # by another limit it was another wait
                raise _refusal(key, request, shut[0] - now, shut[1] - now)
            del self._shut[key.id]
        hand = self._hand(key)
        want = hand.single if tokens == 1 else Want(key.id, hand.single.limit, tokens, tokens)
        taken = await self._batches.ask(want, until)
        reset_s = taken.reset_us / 1e6
        if not taken.granted:
            wait_s = (taken.wait_us or 0) / 1e6 + had * 1e6 / key.limit.micro_rate
            if tokens == 1 and not had and len(self._shut) < MOST_SHUT:
                now = asyncio.get_running_loop().time()
                self._shut[key.id] = (now + wait_s, now + reset_s, key.limit)
            raise _refusal(key, request, wait_s, reset_s)
        if hand.most and not hand.filling:
            self._fill(key, hand, until)
        _tell(key, request, taken.remaining, reset_s)

    def from_hand(self, key: Key, request: DoorRequest, until: float, tokens: int = 1) -> bool:
        """Take the tokens of a request if they are in hand; whether they were. Its answer is told of it."""
        hand = self._hand(key)
        if hand.tokens < tokens:
            return False
        hand.tokens -= tokens
        if 2 * hand.tokens < hand.most and not hand.filling:
            self._fill(key, hand, until)
        _tell(key, request, hand.remaining + hand.tokens, hand.reset_s)
        return True

    def _hand(self, key: Key) -> _Hand:
        """Return what is in hand of a key."""
        hand = self._hands.get(key.id)
        if hand is not None and (hand.limit is key.limit or hand.limit == key.limit):
            return hand
        single = Want(key.id, shared(key.limit))
        hand = self._hands[key.id] = _Hand(key.limit, single, in_hand(key.limit))
        if len(self._hands) > MOST_HANDS:
            self._hands.popitem(last=False)
        return hand

    def _fill(self, key: Key, hand: _Hand, until: float) -> None:
        """Take tokens ahead, off the request's path."""

        def filled(answer: asyncio.Future[Taken]) -> None:
            hand.filling = False
            if answer.cancelled() or answer.exception() is not None:
                return  # an outage: requests that need the database say so
            taken = answer.result()
            hand.tokens += taken.granted
            hand.remaining, hand.reset_s = taken.remaining, taken.reset_us / 1e6

        hand.filling = True
        want = Want(key.id, hand.single.limit, hand.most - hand.tokens, 1)
        self._batches.ask(want, until).add_done_callback(filled)

    async def _take(self, link: Link, batch: list[Ticket[Want, Taken]]) -> None:
        """Ask once for all tokens of a key, and hand them out in the order of the requests."""
        until = max(ticket.until for ticket in batch)
        alike: dict[int, list[Ticket[Want, Taken]]] = {}
        for ticket in batch:
            alike.setdefault(id(ticket.question), []).append(ticket)
        groups: list[tuple[Want, list[Ticket[Want, Taken]]]] = []
        for tickets in alike.values():
            want = tickets[0].question
            if len(tickets) > 1:  # the single ones of a key
                want = Want(want.key, want.limit, len(tickets), 1)
            groups.append((want, tickets))
        wants = [want for want, _ in groups]
        tries = 0
        while True:
            tries += 1
            try:
                await until_ready(link, until)
                left_s = max(0.05, until - asyncio.get_running_loop().time())
                answers = await link.run(lambda conn: limits.take(conn, wants), deadline_s=left_s)
                break
            except StoreUnavailable as error:
                if all(ticket.answer.done() for ticket in batch):
                    return
                await pause(link, tries, until, error)
        for (_, tickets), taken in zip(groups, answers, strict=True):
            if len(tickets) == 1:
                tickets[0].tell(taken)
                continue
            for place, ticket in enumerate(tickets):
                granted = int(place < taken.granted)
                remaining = taken.remaining + max(0, taken.granted - place - 1)
                ticket.tell(Taken(granted, remaining, taken.wait_us, taken.reset_us))


def _refusal(key: Key, request: DoorRequest, wait_s: float, reset_s: float) -> Refused:
    _tell(key, request, 0, reset_s)
    after = str(max(1, -int(-wait_s // 1)))
    return Refused(
        "rate_limited",
        f"more requests than this key may make; try again in {after} s",
        headers={"Retry-After": after},
    )


def _tell(key: Key, request: DoorRequest, remaining: int, reset_s: float) -> None:
    request.extra = (
        f"RateLimit-Limit: {key.limit.burst}\r\nRateLimit-Remaining: {remaining}\r\n"
        f"RateLimit-Reset: {math.ceil(reset_s)}\r\n"
    )
