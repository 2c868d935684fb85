"""The durable server that the cases of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.rig.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def durable() -> Iterator[Cluster]:
    """One server with fsync on; each case has a database of its own in it."""
    with cluster() as made:
        yield made
