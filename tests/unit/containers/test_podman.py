"""What podman is asked for: a pure function of the request. The real one is exercised in tests/cluster."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from orchestrator.containers.payload import Mount
from orchestrator.containers.podman import Podman, PodmanRuntime, create_arguments, exec_command
from orchestrator.errors import ContainerError
from tests.unit.containers.test_docker import request


def arguments(*, rootless: bool = False, **changes: object) -> list[str]:
    return create_arguments(request(**changes), rootless=rootless)


def test_the_image_s_own_entrypoint_is_silenced_and_the_image_never_exchanged() -> None:
    made = arguments()
    assert '--entrypoint=["python3"]' in made
    assert "--pull=never" in made
    assert made[-3:] == ["sha256:" + "a" * 64, "/n/launch.py", "/n/config.json"]


def test_it_is_found_again_by_run_attempt_and_node() -> None:
    labels = [word for word in arguments() if word.startswith("--label=")]
    assert labels == [
        "--label=orch.run_id=run-0123456789",
        "--label=orch.run_dir=/root=a/runs/run-0123456789",
        "--label=orch.attempt=3",
        "--label=orch.node=n7",
    ]


def test_files_belong_to_the_submitting_user() -> None:
    user = f"--user={os.getuid()}:{os.getgid()}"
    assert user in arguments()
    assert "--userns=keep-id" not in arguments()
    rootless = arguments(rootless=True)
    assert {user, "--userns=keep-id", "--group-add=keep-groups"} <= set(rootless)


def test_mounts_are_quoted_as_csv() -> None:
    odd = "/a:b,c \"d\" 'e'\n$(f)"
    made = arguments(mounts=(Mount(odd, odd, read_only=True), Mount("/b", "/c")))
    mounts = [made[index + 1] for index, word in enumerate(made) if word == "--mount"]
    quoted = odd.replace('"', '""')
    assert mounts == [
        f'"type=bind","source={quoted}","target={quoted}","readonly=true"',
        '"type=bind","source=/b","target=/c"',
    ]


def test_the_network_is_the_host_s_only_where_nodes_must_talk() -> None:
    assert "--network=bridge" in arguments()
    assert "--network=private" in arguments(rootless=True)
    assert "--network=host" in arguments(host_network=True)


def test_memory_is_limited_without_swap_and_shared_memory_is_more_than_64_mib() -> None:
    made = arguments(mem_bytes=4 * 1024**3, cpus=1)
    assert {f"--memory={4 * 1024**3}b", f"--memory-swap={4 * 1024**3}b", f"--shm-size={2 * 1024**3}b"} <= set(made)
    assert "--cpus=1" in made
    assert not [word for word in arguments() if word.startswith(("--memory", "--cpus", "--shm"))]


def test_the_container_gets_the_gpus_and_the_limits_of_the_step_and_no_others() -> None:
    made = arguments(gpus=("2", "GPU-3"), limits={"nofile": 1024, "memlock": -1})
    assert [word for word in made if word.startswith("--device")] == [
        "--device=nvidia.com/gpu=2",
        "--device=nvidia.com/gpu=GPU-3",
    ]
    assert [word for word in made if word.startswith("--ulimit")] == [
        "--ulimit=nofile=1024:1024",
        "--ulimit=memlock=-1:-1",
    ]


def test_a_shell_enters_as_the_user() -> None:
    command = exec_command("c0ffee", ["python3", "x"], terminal=True)
    assert command[:4] == ["podman", "exec", "--interactive", "--tty"]
    assert f"--user={os.getuid()}:{os.getgid()}" in command
    assert command[-3:] == ["c0ffee", "python3", "x"]


def fake(directory: Path, script: str) -> dict[str, str]:
    """PATH with a podman that does what no real one can be made to do on demand."""
    program = directory / "podman"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}


def test_a_node_without_podman(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="has no podman"):
        PodmanRuntime({"PATH": str(tmp_path)}).has_image("sha256:0")


def test_one_that_does_not_answer_has_a_deadline(tmp_path: Path) -> None:
    environ = fake(tmp_path, "exec sleep 60")
    with pytest.raises(ContainerError, match="podman info does not answer on node"):
        Podman(environ).run("info", timeout_s=0.2)


def test_a_notice_does_not_end_a_command_between_create_and_start(tmp_path: Path) -> None:
    environ = fake(tmp_path, "kill -TERM $$; kill -USR1 $$; echo done")
    assert Podman(environ).ask("create") == "done\n"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def entry(name: str, state: str, **labels: str) -> dict[str, object]:
    return {"Id": name, "State": state, "Labels": {f"orch.{key}": value for key, value in labels.items()}}


OF_RUN = {"run_id": "r", "run_dir": '/a,"b', "node": "n1"}
FOUND = [
    entry("old", "exited", attempt="1", **OF_RUN),
    entry("new", "running", attempt="2", **OF_RUN),
    entry("elsewhere", "running", attempt="1", **{**OF_RUN, "node": "n2"}),
    entry("alien", "running", run_id="x"),
]
CONTAINERS = f"""
case "$1 $2" in
  "ps --all") echo '{json.dumps(FOUND)}' ;;
  "rm "*) echo "$@" >>"$0.removed" ;;
  "container inspect") echo "Error: $(cat "$0.says")" >&2; exit 125 ;;
esac
"""


def test_leftovers_are_found_whatever_their_directory_is_called(tmp_path: Path) -> None:
    runtime = PodmanRuntime(fake(tmp_path, CONTAINERS))
    assert runtime.remove_leftovers('/a,"b', "n1", 2) == ["old"]
    assert (tmp_path / "podman.removed").read_text() == "rm --force --time=0 --ignore --volumes old\n"
    assert [found.id for found in runtime.labelled()] == ["old", "new", "elsewhere"]


def test_a_question_that_fails_is_no_ended_container(tmp_path: Path) -> None:
    podman = Podman(fake(tmp_path, CONTAINERS))
    (tmp_path / "podman.says").write_text("no such container c0ffee")
    assert podman.state("c0ffee") == {}
    (tmp_path / "podman.says").write_text("database is locked")
    with pytest.raises(ContainerError, match="database is locked"):
        podman.state("c0ffee")


def test_a_python_without_pidfds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(ContainerError, match="pidfd_open"):
        PodmanRuntime({})


def test_passwords_of_the_host_s_proxy_stay_outside() -> None:
    assert "--http-proxy=false" in arguments()
