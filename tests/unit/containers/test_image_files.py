"""Image files, and apptainer, which runs them: the argument list of each case, and the child process with a stub.

apptainer cannot be had here: what is shown is that we say what its pages ask for, not that it does it.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from orchestrator.containers.apptainer import ApptainerRuntime, environment, exec_command
from orchestrator.containers.image_file import file_of, sha256_of, split_pin
from orchestrator.containers.payload import Mount, Payload
from orchestrator.errors import ContainerError
from tests.unit.containers.test_docker import request

ODD = "/a:b,c \"d\" 'e'\n$(f)"
ARGV = ("python3", "/n/launch.py", "/n/config.json")
CONTENT = b"squashed"


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "train.sqsh"
    path.write_bytes(CONTENT)
    return f"{path}@sha256:{hashlib.sha256(CONTENT).hexdigest()}"


# --- the pin
def test_a_pinned_file_is_read_by_whoever_is_to_verify_it(image: str) -> None:
    path, digest = split_pin(image)
    assert file_of(image, node="n1", verify=True) == path
    assert sha256_of(path) == digest
    path.write_bytes(b"another")
    with pytest.raises(ContainerError, match="is not the one that was pinned"):
        file_of(image, node="n1", verify=True)
    assert file_of(image, node="n1", verify=False) == path
    path.unlink()
    for verify in (True, False):
        with pytest.raises(ContainerError, match="cannot be read on n1: No such file"):
            file_of(image, node="n1", verify=verify)


# --- apptainer
def test_apptainer_is_asked_for_a_closed_container() -> None:
    assert exec_command(request(cwd="/code"), "/i.sif") == [
        "apptainer", "exec", "--containall", "--no-eval", "--pwd=/code",
        "--mount", '"type=bind","source=/tmp","destination=/tmp"', "/i.sif", *ARGV,
    ]  # fmt: skip


def test_apptainer_s_mounts_are_quoted_as_csv() -> None:
    command = exec_command(request(mounts=(Mount(ODD, "/x", read_only=True),)), "/i.sif")
    quoted = ODD.replace('"', '""')
    assert f'"type=bind","source={quoted}","destination=/x","ro"' in command


def test_apptainer_gets_gpus_devices_and_values_whatever_they_hold() -> None:
    asked = request(gpus=("2", "3"), devices=("/dev/infiniband/uverbs0",), environ={"A": "b,c=d\n"})
    command = exec_command(asked, "/i.sif")
    assert "--nv" in command
    device = "/dev/infiniband/uverbs0"
    assert f'"type=bind","source={device}","destination={device}"' in command
    assert environment(asked) == {"APPTAINERENV_A": "b,c=d\n", "APPTAINERENV_CUDA_VISIBLE_DEVICES": "2,3"}
    assert environment(request()) == {}


# --- the child
STUB = '#!/bin/sh\nwhile [ "$1" != python3 ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ApptainerRuntime:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return ApptainerRuntime()


def end_of(payload: Payload) -> int:
    until = time.monotonic() + 20
    while (code := payload.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return code


def test_the_exit_code_is_the_program_s(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = request(argv=("python3", "-c", "print('hello'); raise SystemExit(75)"), image=image, cwd="/", log=log)
    payload = runtime.start(asked)
    assert end_of(payload) == 75
    assert log.read_text() == "hello\n"
    assert payload.describe()["runtime"] == "apptainer"


def test_a_killed_one_is_dead(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    argv = ("python3", "-c", "import time; time.sleep(600)")
    payload = runtime.start(request(argv=argv, image=image, cwd="/", log=tmp_path / "log"))
    assert payload.poll() is None
    payload.kill()
    assert end_of(payload) == 137


def test_another_image_is_not_started(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    split_pin(image)[0].write_bytes(b"another")
    with pytest.raises(ContainerError, match="is not the one that was pinned"):
        runtime.start(request(image=image, cwd="/", log=tmp_path / "log"))


def test_a_node_without_the_program(
    runtime: ApptainerRuntime, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContainerError, match="cannot start apptainer: No such file") as caught:
        runtime.start(request(image=image, cwd="/", log=tmp_path / "log"))
    assert caught.value.hint


def test_a_node_directory_below_dev_cannot_be_mounted(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    asked = request(image=image, cwd="/", scratch=Path("/dev/shm/orch-0/run"), log=tmp_path / "log")
    with pytest.raises(ContainerError, match="a /dev of its own") as caught:
        runtime.start(asked)
    assert "ORCH_NODE_DIR" in (caught.value.hint or "")
