"""`orch image build` on the real builders: the same inputs give the same image, and it holds what it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.operations.image_build import ensure_wheels, read_hashed_lock
from tests.cluster.cache import cache_directory, locked
from tests.cluster.handle import Cluster
from tests.cluster.image import BASE_LOCK, LOCK, REPOSITORY, base_system, lock_python

BASE = "orch-test/build-base:1"
SOURCES = ("orchestrator", "jobs", "slurm_templates", "containers", "pyproject.toml", "README.md")
TIMES = (1_000_000_000, 1_700_000_000)
PROGRAM = """
import importlib.util, os, pathlib, shutil
import orchestrator, torch
assert os.getuid() != 0 and not os.access(os.path.dirname(torch.__file__), os.W_OK)
assert torch.ones(2).sum() == 2
left = [path for path in ("/wheels", "/project", "/requirements.lock", "/tmp/installer") if os.path.exists(path)]
tools = [tool for tool in ("pip", "pip3", "gcc", "cc", "make", "git") if shutil.which(tool)]
assert not left + tools and importlib.util.find_spec("pip") is None, (left, tools)
code = pathlib.Path(torch.__cached__).read_bytes()
assert code[4] & 1, "bytecode by time, which is stale once every file's time is 0"
assert pathlib.Path(torch.__file__).stat().st_mtime == 0
print(orchestrator.__version__)
"""


def copied(directory: Path) -> None:
    """A commit of what is in this checkout now."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, directory / name)
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for arguments in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "--no-gpg-sign", "--no-verify", "--message=x"],
    ):
        subprocess.run(["git", "-C", str(directory), *arguments], check=True, env={**os.environ, **identity})


def aged(directory: Path, time: int) -> None:
    """Every file gets another time."""
    for path in directory.rglob("*"):
        os.utime(path, (time, time))


@pytest.fixture
def built(cluster: Cluster, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """What two builds of `base` say, from two directories."""
    with locked(cache_directory()):
        ensure_wheels(read_hashed_lock(BASE_LOCK), cache_directory())
    (tmp_path / "orch").symlink_to(cache_directory())
    cluster.run("podman", "import", "--quiet", str(base_system()), BASE, timeout=120)
    copied(tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    said = []
    for number, time in enumerate(TIMES):
        aged(tmp_path / str(number), time)
        image = tmp_path / str(number) / "containers" / "base"
        argv = [sys.executable, "-m", "orchestrator", "image", "build", str(image), f"--base={BASE}", "--json"]
        done = cluster.run(*argv, f"--tag=orch-test/built:{number}", env={"XDG_CACHE_HOME": str(tmp_path)}, timeout=900)
        said.append(json.loads(done.stdout))
    yield said
    tags = [f"orch-test/built:{number}" for number in range(len(TIMES))]
    cluster.run("podman", "rmi", "--force", *tags, BASE, timeout=120, check=False)


def inspected(cluster: Cluster, builder: str, image: str) -> Any:
    (found,) = json.loads(cluster.run(builder, "image", "inspect", image).stdout)
    return found


def test_the_same_inputs_give_the_same_image(cluster: Cluster, built: list[dict[str, Any]]) -> None:
    """One test, because a build takes a minute: the image is looked at, too."""
    first, second = built
    assert (first["builder"], first["reproducible"], len(first["revision"])) == ("podman", True, 40)
    assert {**first, "tag": None} == {**second, "tag": None}
    found = [inspected(cluster, "podman", one["tag"]) for one in built]
    assert found[0]["Digest"] == found[1]["Digest"]
    config = found[0]["Config"]
    assert (config["User"], config["Entrypoint"]) == ("65532:65532", ["orch"])
    assert config["Labels"] == {
        "org.opencontainers.image.revision": first["revision"],
        "orch.lock.sha256": read_hashed_lock(BASE_LOCK).sha256,
    }
    run, tag = ["podman", "run", "--rm", "--network=none"], first["tag"]
    inside = cluster.run(*run, "--entrypoint=python3", tag, "-c", PROGRAM, timeout=60).stdout
    assert cluster.run(*run, tag, "--version", timeout=60).stdout == f"orch {inside}"


def test_docker_builds_the_image_of_the_other_tests(cluster: Cluster) -> None:
    assert cluster.image is not None
    config = inspected(cluster, "docker", cluster.image)["Config"]
    assert config["Labels"]["orch.lock.sha256"] == read_hashed_lock(LOCK).sha256
    assert (config["User"], config["Entrypoint"]) == ("65532:65532", ["/usr/bin/env"])


def test_an_interpreter_with_the_packages_of_the_image(cluster: Cluster) -> None:
    code = (
        "import importlib.metadata as m, sys, orchestrator, torch\n"
        "print(orchestrator.__file__, torch.__version__, *sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
    )
    ours = subprocess.run([lock_python(), "-c", code], cwd="/", env={}, check=True, capture_output=True, text=True)
    where, version, *packages = ours.stdout.split()
    assert Path(where) == REPOSITORY / "orchestrator" / "__init__.py"
    assert version.endswith("+cpu")
    listing = "import importlib.metadata as m; print(*sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
    image = cluster.image
    assert image is not None
    inside = cluster.run("docker", "run", "--rm", "--network=none", image, "python3", "-c", listing, timeout=60)
    assert inside.stdout.split() == packages
