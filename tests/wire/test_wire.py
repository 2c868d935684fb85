"""Frames survive any way in which a pipe may cut them, and nothing that is no frame gets through."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.wire import (
    MAX_FRAME,
    Broken,
    BrokenFrame,
    Cancel,
    Completed,
    Finished,
    Log,
    Plugin,
    Progress,
    Reader,
    Ready,
    Setup,
    Start,
    Started,
    Stop,
    ToChild,
    ToSupervisor,
    TypeSetup,
    frame,
)

numbers = st.integers(0, 2**53)
# Not None: where a result may be absent, msgspec reads JSON null as the raw text `null`.
raws = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
).map(lambda value: msgspec.Raw(msgspec.json.encode(value)))

to_child = st.one_of(
    st.builds(Start, numbers, st.text(), st.text(), numbers, numbers, st.floats(0, 1e9), st.text(), raws),
    st.builds(Cancel, numbers, st.text()),
    st.builds(Stop),
    st.builds(
        Setup,
        node=st.text(),
        child=numbers,
        plugins=st.lists(st.builds(Plugin, module=st.text(), options=st.dictionaries(st.text(), st.text()))),
        types=st.lists(st.builds(TypeSetup, type=st.text(), handler=st.text())),
        slots=numbers,
        isolation=st.text(),
        result_bytes=numbers,
        error_bytes=numbers,
        log_lines=numbers,
    ),
)
to_supervisor = st.one_of(
    st.builds(Ready, numbers),
    st.builds(Broken, st.text()),
    st.builds(Started, st.lists(numbers)),
    st.builds(Completed, st.lists(numbers), st.lists(raws, max_size=3)),
    st.builds(Log, numbers, st.floats(0, 1e10), st.text(), st.text()),
    st.builds(Progress, numbers, st.floats(0, 100), st.text()),
    st.builds(
        Finished,
        numbers,
        st.text(),
        st.booleans(),
        raws,
        st.none() | st.text(),
        st.none() | st.floats(0, 1e9),
        st.none() | numbers,
        submits=st.lists(raws, max_size=3),
    ),
)


def plain(messages: list[Any]) -> list[Any]:
    """Return `messages` as what can be compared; raw members only by identity."""
    return [(type(message), msgspec.json.encode(message)) for message in messages]


@pytest.mark.parametrize(("kind", "messages"), [(ToChild, to_child), (ToSupervisor, to_supervisor)])
@given(data=st.data())
def test_a_stream_cut_anywhere_gives_the_same_messages(
    kind: object, messages: Any, data: st.DataObject
) -> None:
    batches = data.draw(st.lists(st.lists(messages, max_size=4), max_size=4))
    stream = b"".join(frame(batch) for batch in batches)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = Reader(kind)

    read = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read += reader.feed(stream[begin:end])

    assert plain(read) == plain([message for batch in batches for message in batch])


@given(noise=st.binary(min_size=1, max_size=200))
def test_noise_is_a_broken_frame_or_waits_for_more(noise: bytes) -> None:
    reader = Reader(ToChild)

    try:
        messages = reader.feed(noise)
    except BrokenFrame:
        return

    assert messages == [] or noise.startswith(b"\0\0\0")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{}", id="no array"),
        pytest.param(b'[["unknown",1]]', id="an unknown message"),
        pytest.param(b'[["started",1]]', id="a message of the other direction"),
        pytest.param(b'[["cancel",1]]', id="a member is missing"),
        pytest.param(b'[["cancel","1","x"]]', id="a member of another type"),
        pytest.param(b'[["cancel",1,"\xff"]]', id="no UTF-8"),
        pytest.param(b'[["cancel",1,' + b"[" * 100_000 + b"]" * 100_000 + b"]]", id="deeper than the stack"),
    ],
)
def test_what_is_no_message_breaks_the_frame(body: bytes) -> None:
    with pytest.raises(BrokenFrame):
        Reader(ToChild).feed(len(body).to_bytes(4, "big") + body)


def test_a_length_beyond_the_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(BrokenFrame, match="longer than"):
        Reader(ToChild).feed((MAX_FRAME + 1).to_bytes(4, "big"))


def test_payloads_keep_their_bytes_when_more_is_read_behind_them() -> None:
    reader = Reader(ToChild)
    start = Start(1, "t", "id", 1, 3, 1.0, "c", msgspec.Raw(b'{"a": 1.10}'))

    [first] = reader.feed(frame([start]))
    assert isinstance(first, Start)
    reader.feed(frame([start] * 100))

    assert bytes(first.payload) == b'{"a": 1.10}'
