"""Image files, and what runs them, apptainer and enroot: the argument list of each case, and the child with a stub.

Neither can be had here: what is shown is that we say what their pages ask for, not that they do it.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.containers import pyxis
from orchestrator.containers.apptainer import ApptainerRuntime, environment, exec_command
from orchestrator.containers.image_file import file_of, sha256_of, split_pin
from orchestrator.containers.payload import Mount, Payload, PayloadRequest, Runtime
from orchestrator.containers.pyxis import PyxisRuntime, container_name, start_command
from orchestrator.errors import ContainerError
from tests.unit.containers.test_docker import request

ODD = "/a:b,c \"d\" 'e'\n$(f)"
STUBS = Path(__file__).parents[2] / "cluster" / "stubs"
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


def begun(runtime: Runtime, asked: PayloadRequest) -> Payload:
    runtime.prepare(asked)
    return runtime.start(asked)


def end_of(payload: Payload) -> int:
    until = time.monotonic() + 60
    while (code := payload.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return code


def test_the_exit_code_is_the_program_s(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = request(argv=("python3", "-c", "print('hello'); raise SystemExit(75)"), image=image, cwd="/", log=log)
    payload = begun(runtime, asked)
    assert end_of(payload) == 75
    assert log.read_text() == "hello\n"
    assert payload.describe()["runtime"] == "apptainer"


def test_a_killed_one_is_dead(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    argv = ("python3", "-c", "import time; time.sleep(600)")
    payload = begun(runtime, request(argv=argv, image=image, cwd="/", log=tmp_path / "log"))
    assert payload.poll() is None
    payload.kill()
    assert end_of(payload) == 137


def test_another_image_is_not_started(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    split_pin(image)[0].write_bytes(b"another")
    with pytest.raises(ContainerError, match="is not the one that was pinned"):
        begun(runtime, request(image=image, cwd="/", log=tmp_path / "log"))


def test_a_node_without_the_program(
    runtime: ApptainerRuntime, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContainerError, match="cannot start apptainer: No such file") as caught:
        begun(runtime, request(image=image, cwd="/", log=tmp_path / "log"))
    assert caught.value.hint


def test_a_node_directory_below_dev_cannot_be_mounted(runtime: ApptainerRuntime, image: str, tmp_path: Path) -> None:
    asked = request(image=image, cwd="/", scratch=Path("/dev/shm/orch-0/run"), log=tmp_path / "log")
    with pytest.raises(ContainerError, match="a /dev of its own") as caught:
        begun(runtime, asked)
    assert "ORCH_NODE_DIR" in (caught.value.hint or "")


# --- pyxis
NAME = "orch-" + hashlib.sha256(b"/root=a/runs/run-0123456789").hexdigest()[:16] + "-n7-3"
TAIL = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', "/code", *ARGV]


def test_enroot_is_asked_to_start_what_it_has_unpacked() -> None:
    assert start_command(request(cwd="/code"), NAME, Path("/n/rc")) == [
        "enroot", "start", "--rw", "--rc=/n/rc", "--env", "HOME", "--env", "NVIDIA_VISIBLE_DEVICES", NAME, *TAIL,
    ]  # fmt: skip


def test_enroot_s_mounts_are_fields_of_an_fstab() -> None:
    mounts = (Mount("/data,x/a'b", "/d", read_only=True), Mount("/out", "/out"))
    command = start_command(request(mounts=mounts), NAME, Path("/n/rc"))
    assert "/data,x/a'b:/d:none:x-create=auto,rbind,ro,nosuid,nodev" in command
    assert "/out:/out:none:x-create=auto,rbind,rw,nosuid,nodev" in command


def test_enroot_gets_values_by_name_and_only_the_gpus_of_the_step() -> None:
    asked = request(gpus=("2", "3"), environ={"A": "b,c=$(d)"})
    command = start_command(asked, NAME, Path("/n/rc"))
    named = ["HOME", "A", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"]
    assert command[4:12] == [word for name in named for word in ("--env", name)]
    values = {"HOME": "/tmp", "A": "b,c=$(d)", "CUDA_VISIBLE_DEVICES": "2,3", "NVIDIA_VISIBLE_DEVICES": "2,3"}
    assert pyxis.environment(asked) == values
    assert pyxis.environment(request()) == {"HOME": "/tmp", "NVIDIA_VISIBLE_DEVICES": "void"}, (
        "an image may ask for all"
    )


def test_an_unpacked_image_is_named_by_run_node_and_attempt() -> None:
    assert container_name("/root=a/runs/run-0123456789", "n7", 3) == NAME


@pytest.fixture
def enroot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PyxisRuntime:
    monkeypatch.setenv("PATH", f"{STUBS}:/usr/bin:/bin")
    monkeypatch.setenv("ORCH_STUB_LOG", str(tmp_path / "calls"))
    monkeypatch.setenv("ORCH_STUB_PATH", "/usr/bin:/bin")
    monkeypatch.setenv("ENROOT_DATA_PATH", str(tmp_path / "data"))
    return PyxisRuntime()


def test_unpacked_started_and_removed(enroot: PyxisRuntime, image: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import os; print(os.getcwd(), os.environ['A']); raise SystemExit(75)"
    asked = request(
        argv=("python3", "-c", program), image=image, cwd="/usr", scratch=tmp_path, log=log, environ={"A": "b $c"}
    )
    payload = begun(enroot, asked)
    assert end_of(payload) == 75
    assert log.read_text() == "/usr b $c\n"
    assert payload.describe()["container"] == NAME
    assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]
    payload.close()
    assert list((tmp_path / "data").iterdir()) == []


def test_of_older_attempts_here_nothing_stays_unpacked(enroot: PyxisRuntime, tmp_path: Path) -> None:
    mine = "/root=a/runs/run-0123456789"
    old, own, later = (container_name(mine, "n7", attempt) for attempt in (2, 3, 12))
    others = [container_name(mine, "n8", 1), container_name("/b/runs/run-0123456789", "n7", 1), "ubuntu", f"{old}-x"]
    for name in (old, own, later, *others):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert enroot.remove_leftovers(mine, "n7", 3) == [old]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {own, later, *others}


def test_half_of_an_image_is_not_left_on_a_full_disk(
    enroot: PyxisRuntime, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = enroot._ask

    def full(*arguments: str, **options: Any) -> str:
        said = real(*arguments, **options)
        if arguments[0] == "create":
            raise ContainerError("no space left on device")
        return said

    monkeypatch.setattr(enroot, "_ask", full)
    with pytest.raises(ContainerError, match="no space left"):
        begun(enroot, request(image=image, cwd="/usr", scratch=tmp_path, log=tmp_path / "log"))
    assert list((tmp_path / "data").iterdir()) == []


def test_what_cannot_be_removed_keeps_no_attempt_from_starting(enroot: PyxisRuntime, tmp_path: Path) -> None:
    mine = "/root=a/runs/run-0123456789"
    stuck = tmp_path / "data" / container_name(mine, "n7", 2)
    stuck.parent.mkdir()
    stuck.symlink_to("/nowhere")
    assert enroot.remove_leftovers(mine, "n7", 3) == []


def test_what_cannot_be_started_is_not_left_unpacked(enroot: PyxisRuntime, image: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        begun(enroot, request(image=image, cwd="/usr", scratch=tmp_path / "absent", log=tmp_path / "log"))
    assert list((tmp_path / "data").iterdir()) == []


def test_a_path_that_enroot_cannot_mount_is_not_tried(enroot: PyxisRuntime, image: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="pyxis cannot mount '/a:b'"):
        begun(enroot, request(image=image, mounts=(Mount("/a:b", "/x"),), scratch=tmp_path, log=tmp_path / "log"))


def test_a_signal_of_the_step_does_not_end_a_start(enroot: PyxisRuntime, image: str, tmp_path: Path) -> None:
    """What is started holds the stop signals back until PID 1 takes the mask off."""
    program = (
        "import signal, os; held = signal.pthread_sigmask(signal.SIG_BLOCK, ()); "
        "print(signal.SIGTERM in held, signal.SIGUSR1 in held)"
    )
    log = tmp_path / "log"
    payload = begun(
        enroot, request(argv=("python3", "-c", program), image=image, cwd="/usr", scratch=tmp_path, log=log)
    )
    assert end_of(payload) == 0
    assert log.read_text() == "True True\n"
