"""API keys, for operators."""

from __future__ import annotations

from uuid import UUID

from taskd.api import answers
from taskd.api.answers import Answer
from taskd.api.body import read_object
from taskd.api.route import Call, Route
from taskd.errors import Refused
from taskd.model import names
from taskd.service.keyask import read_change, read_key, read_rotate


async def create(call: Call) -> Answer:
    """Make a key and show it, this once."""
    ask = read_key(read_object(call.body), now=call.services.now())
    stored, text = await call.services.keys.create(ask, call.operator, call.until)
    return answers.ok(answers.new_key(stored, text), status=201)


async def list_(call: Call) -> Answer:
    """Show all keys, newest first."""
    keys = await call.services.keys.list_(call.until)
    return answers.ok({"Message": "These are the keys", "Keys": [answers.key(one) for one in keys]})


async def show(call: Call) -> Answer:
    """Show one key."""
    return answers.ok(answers.key(await call.services.keys.get(_id(call), call.until)))


async def change(call: Call) -> Answer:
    """Change what a key may do; in force in every process within 2 s."""
    key_id = _id(call)
    members = read_change(read_object(call.body), now=call.services.now())
    stored = await call.services.keys.change(key_id, members, call.operator, call.until)
    return answers.ok(answers.key(stored))


async def rotate(call: Call) -> Answer:
    """Make a key of the same client in place of this one, which works until the overlap is over."""
    key_id = _id(call)
    ask = read_rotate(read_object(call.body), now=call.services.now())
    stored, text, old = await call.services.keys.rotate(key_id, ask, call.operator, call.until)
    return answers.ok(answers.rotated_key(stored, text, old), status=201)


async def revoke(call: Call) -> Answer:
    """Revoke a key; it stops working in every process within 2 s."""
    await call.services.keys.revoke(_id(call), call.operator, call.until)
    return Answer(204)


def _id(call: Call) -> UUID:
    found = names.uuid(call.part("id"))
    if found is None:
        raise Refused("not_found", "there is no such key")
    return found


ROUTES = (
    Route(method="POST", path="/admin/api-keys", run=create, admin=True, body=True),
    Route(method="GET", path="/admin/api-keys", run=list_, admin=True),
    Route(method="GET", path="/admin/api-keys/<id:str>", run=show, admin=True),
    Route(method="PATCH", path="/admin/api-keys/<id:str>", run=change, admin=True, body=True),
    Route(method="DELETE", path="/admin/api-keys/<id:str>", run=revoke, admin=True),
    Route(method="POST", path="/admin/api-keys/<id:str>/rotate", run=rotate, admin=True, body=True),
)
