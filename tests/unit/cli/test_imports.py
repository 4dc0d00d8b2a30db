"""No command imports torch or lightning, and reading commands import nothing that starts slowly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.unit.operations.conftest import World, world

__all__ = ["world"]

PROBE = """
import json, sys
from orchestrator.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""

NEVER = {"torch", "lightning", "torchvision", "timm", "kornia", "numpy", "fsspec"}
SLOW = {"pydantic", "docker", "submitit", "jinja2", "rich", "requests", "yaml", "asyncio"}


def imported(*arguments: str) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    code, names = json.loads(done.stderr.splitlines()[-1])
    return int(code), set(names)


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "submit --help",
        "status --help",
        "image lock --help",
        "image build --help",
        "top --help",
        "shell --help",
        "ps --json",
        "status nobody",
        "logs nobody",
    ],
)
def test_looking_costs_nothing(world: World, command: str) -> None:
    _, names = imported(*command.split())
    assert not names & (NEVER | SLOW)


def test_status_of_a_run_imports_nothing_slow(world: World) -> None:
    run = world.ended("completed", "completed", step=3)
    for arguments in (["status", run, "--json"], ["wait", run], ["logs", "--node", "0", run], ["cancel", run]):
        _, names = imported(*arguments)
        assert not names & (NEVER | SLOW), arguments


@pytest.mark.parametrize(
    "command", ["validate {spec}", "doctor {spec}", "submit {spec} --dry-run", "schema", "site", "submit {spec}"]
)
def test_no_command_imports_torch(world: World, command: str) -> None:
    _, names = imported(*command.format(spec=world.spec).split())
    assert not names & NEVER


def test_what_looks_at_checkpoints_imports_nothing_slow(world: World) -> None:
    run = world.ended("completed", "completed", step=3)
    for arguments in (["ckpt", "ls", run], ["ckpt", "verify", run, "--step", "1"], ["ckpt", "gc", run, "--dry-run"]):
        _, names = imported(*arguments)
        assert not names & (NEVER | SLOW), arguments


def test_image_lock_imports_no_torch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")
    code, names = imported("image", "lock", "a:b")
    assert code == 4
    assert not names & NEVER
