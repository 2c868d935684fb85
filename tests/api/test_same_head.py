"""A connection whose requests have the same head, byte by byte: what was found out is used again, no more."""

from __future__ import annotations

import http.client
import json

import psycopg

from tests.api.server import Reply, Server, make_key, publish, running, send_on, settings


def submit(connection: http.client.HTTPConnection, key: str, body: bytes) -> Reply:
    """Send a submit with a body of 64 bytes, so that heads differ in nothing."""
    return send_on(connection, "POST", "/jobs", key=key, body=body.ljust(64))


def echo(number: int) -> bytes:
    return json.dumps({"type": "echo", "payload": {"number": number}}).encode()


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)


async def test_each_request_has_its_own_body_id_and_answer(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1, rate=0.001, burst=100)) as server:
        connection = connect(server)
        replies = [submit(connection, key, echo(number)) for number in range(3)]
        broken = submit(connection, key, b'{"type":"echo","payload":')
        after = submit(connection, key, echo(3))
        connection.close()

    assert [reply.status for reply in (*replies, broken, after)] == [200, 200, 200, 400, 200]
    told = [*replies, broken, after]
    assert len({reply.headers["x-request-id"] for reply in told}) == 5
    assert [reply.headers["ratelimit-remaining"] for reply in told] == ["99", "98", "97", "96", "95"]
    ids = [reply.body["job_id"] for reply in (*replies, after)]
    cursor = await db.execute(
        "select (payload->>'number')::integer from taskd.jobs order by array_position(%s::uuid[], id)", (ids,)
    )
    assert await cursor.fetchall() == [(0,), (1,), (2,), (3,)]


async def test_a_key_that_was_revoked_stops_on_the_connection_that_used_it(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    with running(settings(database_url, workers=1)) as server:
        made = server.admin("POST", "/admin/api-keys", {"name": "a"}).body
        connection = connect(server)
        before = submit(connection, made["key"], echo(0)).status
        server.admin("DELETE", f"/admin/api-keys/{made['id']}")
        statuses = [before]
        while statuses[-1] == 200 and len(statuses) < 10_000:
            statuses.append(submit(connection, made["key"], echo(0)).status)
        connection.close()

    assert before == 200
    assert statuses[-1] in (401, 429)


async def test_a_body_of_which_some_is_still_to_come_is_waited_for(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        head = (
            b"POST /jobs HTTP/1.1\r\nHost: t\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: 64\r\n\r\n" % key.encode()
        )
        connection = connect(server)
        connection.connect()
        statuses = []
        for cut in (len(head) + 64, len(head) + 10, len(head), 20):
            request = head + echo(cut).ljust(64)
            connection.sock.sendall(request[:cut])
            connection.sock.sendall(request[cut:])
            answer = http.client.HTTPResponse(connection.sock)
            answer.begin()
            answer.read()
            statuses.append(answer.status)
        connection.close()

    assert statuses == [200, 200, 200, 200]
