"""The durable server that the cases of this folder share, and the report of the fault plan."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.faults.rig.cluster import Cluster, cluster
from tests.faults.rig.report import Report, listed

FAILED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the file that `make faults` writes."""
    parser.addoption("--faults-report", metavar="FILE", default=None, help="write what was measured to FILE")


@pytest.fixture(scope="session")
def durable() -> Iterator[Cluster]:
    """One server with fsync on; each case has a database of its own in it."""
    with cluster() as made:
        yield made


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, durable: Cluster) -> Iterator[Report]:
    """What the cases of the fault plan measured; written down at the end if a file is asked for."""
    made = Report(
        postgres=str(durable.query("postgres", "show server_version")[0][0]),
        failed=request.config.stash.setdefault(FAILED, []),
    )
    yield made
    if file := request.config.getoption("--faults-report", default=None):
        page = Path(str(file))
        page.write_text(made.text(), encoding="utf-8")
        contents = page.with_name("README.md")
        if contents.exists():
            contents.write_text(listed(contents.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember which tests failed: the page says so."""
    told = yield
    if told.failed and item.name not in (names := item.config.stash.setdefault(FAILED, [])):
        names.append(item.name)
    return told
