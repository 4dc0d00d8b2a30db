"""What the engine is asked for: a pure function of the request. The engine itself is exercised in tests/cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.containers.docker import container_options
from orchestrator.containers.payload import Mount, PayloadRequest
from orchestrator.worker.node_agent import step_gpus


def request(**changes: Any) -> PayloadRequest:
    fields: dict[str, Any] = {
        "argv": ("python3", "/n/launch.py", "/n/config.json"),
        "cwd": "/code",
        "run_id": "run-0123456789",
        "run_dir": "/root=a/runs/run-0123456789",
        "attempt": 3,
        "node": "n7",
        "image": "sha256:" + "a" * 64,
        "mounts": (),
        "mem_bytes": None,
        "cpus": None,
        "cpuset": "",
        "host_network": False,
        "verify_image": True,
        "images": Path("/images"),
        "devices": (),
        "gpus": (),
        "scratch": Path("/n"),
        "log": Path("/n/log"),
        **changes,
    }
    return PayloadRequest(**fields)


def test_the_image_s_own_entrypoint_is_silenced() -> None:
    options = container_options(request())
    assert options["entrypoint"] == ["python3", "/n/launch.py", "/n/config.json"]
    assert "command" not in options


def test_it_is_found_again_by_run_attempt_and_node() -> None:
    labels = container_options(request())["labels"]
    assert labels == {
        "orch.run_id": "run-0123456789",
        "orch.run_dir": "/root=a/runs/run-0123456789",
        "orch.attempt": "3",
        "orch.node": "n7",
    }


def test_files_belong_to_the_submitting_user() -> None:
    options = container_options(request())
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    assert options["environment"]["HOME"] == "/tmp/home"
    assert f"uid={os.getuid()}" in options["tmpfs"]["/tmp/home"]


def test_mounts_are_binds_whose_paths_have_no_special_characters() -> None:
    odd = "/a:b,c \"d\" 'e'\n$(f)"
    options = container_options(request(mounts=(Mount(odd, odd, read_only=True),)))
    assert options["mounts"] == [{"Type": "bind", "Source": odd, "Target": odd, "ReadOnly": True}]


def test_the_network_is_the_host_s_only_where_nodes_must_talk() -> None:
    assert container_options(request())["network_mode"] == "bridge"
    assert container_options(request(host_network=True))["network_mode"] == "host"


def test_memory_is_limited_without_swap_and_shared_memory_is_more_than_dockers_64_mib() -> None:
    options = container_options(request(mem_bytes=4 * 1024**3, cpus=1))
    assert options["mem_limit"] == options["memswap_limit"] == 4 * 1024**3
    assert options["shm_size"] == 2 * 1024**3
    assert options["nano_cpus"] == 10**9


def test_the_container_gets_the_gpus_of_the_step_and_no_others() -> None:
    assert "device_requests" not in container_options(request())
    (asked,) = container_options(request(gpus=("2", "3")))["device_requests"]
    assert (asked["DeviceIDs"], asked["Count"]) == (["2", "3"], 0)


@pytest.mark.parametrize(
    ("wanted", "environ", "gpus"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, ()),
        (2, {"CUDA_VISIBLE_DEVICES": "2,3", "SLURM_STEP_GPUS": "6,7"}, ("2", "3")),
        (2, {"SLURM_STEP_GPUS": "6,7"}, ("6", "7")),
        (2, {}, ("0", "1")),
    ],
)
def test_which_gpus_are_the_step_s(wanted: int, environ: dict[str, str], gpus: tuple[str, ...]) -> None:
    assert step_gpus(wanted, environ) == gpus


def test_nothing_of_the_job_s_environment_shows_in_inspect() -> None:
    environment = container_options(request(environ={"VISIBLE": "1"}))["environment"]
    assert set(environment) == {"VISIBLE", "HOME", "USER", "LOGNAME"}
