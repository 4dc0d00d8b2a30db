"""What the engine may answer at the worst moment. Its real behaviour is exercised in tests/cluster."""

from __future__ import annotations

from typing import Any

import docker.errors
import pytest
import requests

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

    def __init__(self, *containers: Container) -> None:
        self.made = list(containers)
        self.containers = self.images = self

    def list(self, **_: Any) -> list[Container]:
        return self.made

    def get(self, image: str) -> None: ...

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
