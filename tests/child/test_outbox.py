"""What a child tells its supervisor comes in frames that a supervisor of many children can hold."""

from __future__ import annotations

import msgspec
import pytest

from taskd.child.outbox import MAX_FRAME, MAX_LINE, frames
from taskd.wire import Completed, Log, Reader, ToSupervisor


def told(data: list[bytes]) -> list[object]:
    reader = Reader(ToSupervisor)
    return [message for one in data for message in reader.feed(one)]


@pytest.mark.parametrize("lines", [1, 2, 3, 100, 1000])
def test_many_lines_come_in_small_frames_and_in_their_order(lines: int) -> None:
    messages: list[msgspec.Struct] = [Log(1, 0.0, "info", f"{n} ".ljust(MAX_LINE, "x")) for n in range(lines)]

    data = list(frames(messages))

    assert max(map(len, data)) <= MAX_FRAME
    assert told(data) == messages


def test_one_large_message_among_small_ones_has_a_frame_of_its_own() -> None:
    large = Log(1, 0.0, "info", "x" * 2 * MAX_FRAME)
    messages: list[msgspec.Struct] = [*(Log(1, 0.0, "info", str(n)) for n in range(500)), large]
    messages += [Log(1, 0.0, "info", str(n)) for n in range(500)]

    data = list(frames(messages))

    assert sum(len(one) > MAX_FRAME for one in data) == 1
    assert told(data) == messages


def test_small_messages_share_a_frame() -> None:
    messages: list[msgspec.Struct] = [Log(1, 0.0, "info", "short") for _ in range(1000)]

    assert len(list(frames(messages))) == 1


def test_the_ends_of_many_runs_stay_together_behind_their_lines() -> None:
    ends = Completed(list(range(4000)), [msgspec.Raw(b'"' + b"r" * 500 + b'"')] * 4000)
    messages: list[msgspec.Struct] = [Log(1, 0.0, "info", "first"), ends]

    first, second = told(list(frames(messages)))

    assert (type(first), type(second)) == (Log, Completed)
    assert isinstance(second, Completed)
    assert second.runs == ends.runs
