"""A bucket for tests, on a server in this process."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("gcsfs") is None:  # it comes with [test]
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session")
def cloud():
    """The server of all tests, which the libraries of this process and of commands find."""
    from server import serve

    with serve() as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture
def server(cloud):
    """The server with one empty bucket, gs://bucket."""
    cloud.clear()
    return cloud
