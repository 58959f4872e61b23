"""Hosts for the tests that need more than one."""

from collections.abc import Iterator

import pytest

from tests.integration.hosts import Hosts, NoHosts, two_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"no two hosts on this machine: {error}")
