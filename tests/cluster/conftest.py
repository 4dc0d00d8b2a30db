"""Fixtures of the real cluster: one per test process (xdist), and every test leaves it idle again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.requirements import why_not
from tests.cluster.service import Service, accepts, free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder is marked `cluster`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def _release() -> list[str]:
    """ORCH_TEST_SLURM=24.11: that Slurm instead of the machine's."""
    named = os.environ.get("ORCH_TEST_SLURM")
    return ["--slurm", named] if named else []


@pytest.fixture(scope="session")
def cluster_session() -> Iterator[Cluster]:
    """The cluster itself: the one that ORCH_TEST_CLUSTER names (a directory), else a new one that ends with the run."""
    if named := os.environ.get("ORCH_TEST_CLUSTER"):
        yield Cluster.attach(Path(named))
        return
    if reason := why_not():
        pytest.skip(reason)
    started = Cluster.start(*_release())
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def cluster(cluster_session: Cluster) -> Iterator[Cluster]:
    """An idle cluster with slurmdbd, dockerd and the image; the test's jobs and containers are removed after it."""
    yield cluster_session
    cluster_session.tidy()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on loopback; its `host:port`."""
    directory = tmp_path_factory.mktemp("registry")
    port = free_port()
    config = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    service = Service(
        name="docker-registry",
        argv=["docker-registry", "serve", str(directory / "config.yml")],
        env={"PATH": "/usr/bin:/bin"},
        log=directory / "registry.log",
        ready=lambda: accepts(port),
        timeout=60,
    )
    service.start()
    try:
        service.wait_ready()
        yield f"127.0.0.1:{port}"
    finally:
        service.stop()


@pytest.fixture
def orch(cluster: Cluster, tmp_path: Path) -> Orch:
    """The command line against the cluster, with a root of this test's own."""
    return Orch(cluster, tmp_path)


@pytest.fixture(scope="session")
def _plain_session() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    started = Cluster.start("--no-accounting", "--no-docker", *_release())
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def cluster_without_accounting(_plain_session: Cluster) -> Iterator[Cluster]:
    """An idle second cluster without slurmdbd (sacct fails there) and without an engine; up in about two seconds."""
    yield _plain_session
    _plain_session.tidy()
