"""What the engine may answer at the worst moment. Its real behaviour is exercised in tests/cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import docker.errors
import pytest
import requests

from orchestrator.containers import docker as docker_runtime
from orchestrator.containers.docker import DockerRuntime
from orchestrator.errors import ContainerError
from tests.unit.containers.test_docker import request


def answer(status: int, words: str) -> docker.errors.APIError:
    response = requests.Response()
    response.status_code = status
    kind = docker.errors.NotFound if status == 404 else docker.errors.APIError
    return kind(words, response=response, explanation=words)


class Container:
    """A container whose removal and start fail as told."""

    def __init__(self, name: str, *, attempt: int = 0, removal: Exception | None = None, start: Any = None) -> None:
        self.id = name
        self.labels = {"orch.attempt": str(attempt)}
        self.removal, self.starting = removal, start
        self.told: list[str] = []

    def start(self) -> None:
        if self.starting is not None:
            raise self.starting

    def remove(self, *, force: bool, v: bool) -> None:
        self.told.append("remove")
        if self.removal is not None:
            raise self.removal

    def wait(self, *, timeout: float, condition: str) -> None:
        self.told.append(f"wait until {condition}")


class Engine:
    """As much of the SDK's client as the runtime uses."""

    def __init__(self, *containers: Container, pulls: Sequence[Sequence[dict[str, Any]]] = ()) -> None:
        self.made = list(containers)
        self.pulls, self.pulled = list(pulls), 0
        self.hangs: threading.Event | None = None  # until it is set
        self.containers = self.images = self.api = self

    def list(self, **_: Any) -> list[Container]:
        return self.made

    def get(self, image: str) -> None:
        if self.pulls or self.hangs is not None:
            raise docker.errors.ImageNotFound("no such image")

    def pull(self, image: str, *, stream: bool, decode: bool) -> Iterator[dict[str, Any]]:
        self.pulled += 1
        if self.hangs is not None:
            self.hangs.wait(30)
            return
        yield from self.pulls.pop(0)

    def create(self, **_: Any) -> Container:
        return self.made[0]


def runtime(*containers: Container) -> DockerRuntime:
    client: Any = Engine(*containers)
    return DockerRuntime(client)


def test_a_leftover_that_is_just_being_removed_does_not_hide_the_others() -> None:
    vanished = Container("a", removal=answer(404, "No such container"))
    going = Container("b", removal=answer(409, "removal of container b is already in progress"))
    stays, newer = Container("c"), Container("d", attempt=3)
    assert runtime(vanished, going, stays, newer).remove_leftovers("/runs/run", "n1", 3) == ["a", "b", "c"]
    assert going.told == ["remove", "wait until removed"]
    assert stays.told == ["remove"]
    assert newer.told == []


def test_a_leftover_that_stays_is_no_reason_to_begin() -> None:
    with pytest.raises(ContainerError, match="older attempt"):
        runtime(Container("a", removal=answer(500, "driver failed"))).remove_leftovers("/runs/run", "n1", 3)


@pytest.mark.parametrize("failure", [answer(500, "no such device"), requests.ReadTimeout("20 s")])
def test_what_did_not_start_in_time_is_removed(failure: Exception) -> None:
    container = Container("a", start=failure)
    with pytest.raises(ContainerError, match="could not start"):
        runtime(container).start(request())
    assert container.told == ["remove"]


# --- pulls
PIN = "ghcr.io/lab/train@sha256:" + "a" * 64
DONE = {"status": "Status: Downloaded newer image"}


def layer(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    return {"id": name, "status": status, "progressDetail": {"current": current, "total": total} if total else {}}


def pull(engine: Any, report: Any = None) -> None:
    DockerRuntime(engine).ensure_image(PIN, report)


def test_a_pull_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    lines = [
        layer("a", "Pulling fs layer"),
        layer("a", "Downloading", 10, 100),
        layer("b", "Downloading", 50, 300),
        layer("a", "Download complete"),
        layer("a", "Extracting", 90, 100),
        layer("b", "Downloading", 300, 300),
        DONE,
    ]
    pull(Engine(pulls=[lines]), lambda more, total: told.append((more, total)))
    assert told == [(10, 101), (50, 401), (90, 401), (250, 401), (1, 1)]
    assert sum(more for more, _ in told) == 401


def test_an_error_within_the_answer_is_one() -> None:
    engine = Engine(pulls=[[layer("a", "Downloading", 10, 100), {"error": "unauthorized: access denied"}]])
    with pytest.raises(ContainerError, match=f"cannot pull {PIN} on node .*: unauthorized: access denied"):
        pull(engine)
    assert engine.pulled == 1


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DockerRuntime._pull.retry, "wait", lambda _: 0.0)  # type: ignore[attr-defined]
    engine = Engine(pulls=[[{"error": "read: connection reset by peer"}], [{"error": "toomanyrequests: 429"}], [DONE]])
    pull(engine)
    assert engine.pulled == 3


def test_a_pull_that_brings_nothing_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_runtime, "_PULL_S", 0.1)
    engine = Engine()
    engine.hangs = threading.Event()
    with pytest.raises(ContainerError, match="has not come within"):
        pull(engine)
    engine.hangs.set()
    assert engine.pulled == 1, "it is not tried again for half a day"
