"""An image pinned in a registry: fetched by its digest on the node, by both engines; it holds nothing of ours."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.image import base_system
from tests.cluster.orch import Orch
from tests.cluster.programs import script_spec

# Of somebody who has never heard of orch: counts in a file of its own, and ends by itself when it is told.
PROGRAM = """
import importlib.util, os, pathlib, signal, sys, time
assert importlib.util.find_spec("torch") is None
state = pathlib.Path(os.environ["ORCH_RUN_DIR"], "count")
count = int(state.read_text()) if state.exists() else 0
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
while not stop:
    count += 1
    state.write_text(str(count))
    if pathlib.Path(os.environ["ORCH_RUN_DIR"], "enough").exists():
        sys.exit(0)
    time.sleep(0.05)
sys.exit(75)
"""


@pytest.fixture
def pushed(registry: str, cluster: Cluster) -> Iterator[str]:
    """A Debian with python3 and nothing else, in the registry and on no node; its tag."""
    tag = f"{registry}/somebody/python:1"
    cluster.run("docker", "import", str(base_system()), tag, timeout=120)
    cluster.run("docker", "push", tag, timeout=120)
    yield tag
    cluster.run("docker", "rmi", "--force", tag, check=False)


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_a_digest_of_a_registry_is_pulled_preempted_and_resumed(
    orch: Orch, cluster: Cluster, pushed: str, runtime: str
) -> None:
    pin = orch.json("image", "lock", pushed)["image"]
    assert pin.startswith(pushed.rpartition(":")[0] + "@sha256:")
    cluster.run("docker", "rmi", "--force", pushed, pin, check=False)
    job = {"command": ["python3", "train.py"]}
    spec = script_spec(orch, PROGRAM, job=job, container={"runtime": runtime, "image": pin})
    run = orch.submit(spec)["run_id"]
    count = orch.run_dir(run) / "count"
    cluster.wait("a few steps", lambda: count.exists() and int(count.read_text() or 0) > 5, timeout=300)
    cluster.preempt(nodes=3, seconds=1)
    cluster.wait("the second attempt", lambda: len(orch.attempts(run)) == 2, timeout=300)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=90)
    assert [attempt["exit_reason"] for attempt in orch.attempts(run)] == ["preempted", "completed"]
    assert json.loads((orch.run_dir(run) / "plan" / "agent.json").read_text())["container"]["image"] == pin


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_an_image_is_fetched_before_a_run_needs_it(orch: Orch, cluster: Cluster, pushed: str, runtime: str) -> None:
    pin = orch.json("image", "lock", pushed)["image"]
    cluster.run("docker", "rmi", "--force", pushed, pin, check=False)
    asked = (pin, "--runtime", runtime, "--root", str(orch.root))
    (before,) = json.loads(orch.call("image", "verify", *asked, "--json").stdout)
    assert before["problem"] == f"{runtime} of this machine does not have it"
    pulled = orch.json("image", "pull", *asked)
    assert (pulled["image"], pulled["was_here"]) == (pin, False)
    assert orch.json("image", "pull", *asked)["was_here"]
    (after,) = orch.json("image", "verify", *asked)
    assert after["problem"] is None
    program = ("docker", "rmi") if runtime == "docker" else ("podman", "rmi")
    cluster.run(*program, "--force", pin)


@pytest.fixture
def silent_registry() -> Iterator[tuple[str, threading.Event]]:
    """One that takes every connection and never says a word; with it, whether somebody has asked."""
    asked, held = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    held.append(server.accept()[0])
                    asked.set()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
        listener.join(60)
    for connection in held:
        connection.close()


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_a_notice_ends_a_pull(
    orch: Orch, cluster: Cluster, silent_registry: tuple[str, threading.Event], runtime: str
) -> None:
    where, asked = silent_registry
    image = f"{where}/somebody/python@sha256:{'1' * 64}"
    spec = script_spec(orch, container={"runtime": runtime, "image": image}, slurm={"partition": "cancel"})
    run = orch.submit(spec)["run_id"]
    cluster.wait("the pull to begin", asked.is_set, timeout=60)
    cluster.preempt(nodes=3, seconds=1)
    cluster.wait("the second attempt", lambda: len(orch.attempts(run)) == 2, timeout=300)
    first, _ = orch.attempts(run)
    assert (first["exit_reason"], first["outcome"]) == ("preempted", None)
    assert first["ended"] - orch.events(run, "signalled")[0]["at"] < 20, "the grace"
    orch.json("cancel", run)
    orch.wait_for_state(run, "cancelled", timeout=60)


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_a_digest_that_the_registry_does_not_have(orch: Orch, registry: str, runtime: str) -> None:
    image = f"{registry}/somebody/python@sha256:{'0' * 64}"
    run = orch.submit(script_spec(orch, container={"runtime": runtime, "image": image}))["run_id"]
    status = orch.wait_for_state(run, "failed", timeout=90)
    assert status["exit_reason"] == "container_failure"
    assert f"cannot pull {image} on node" in json.dumps(orch.events(run, "verdict"))
