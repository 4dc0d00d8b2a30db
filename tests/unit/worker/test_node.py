"""The node-local directory: private, swept when its owner is gone, never while it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.worker.node import NodeDirectory, attempt_lives, node_root, sweep


def test_it_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    directory = NodeDirectory(tmp_path / "orch", "run.0.n0")
    directory.write_config({"env": {"SECRET": "x"}})
    assert (tmp_path / "orch").stat().st_mode & 0o777 == 0o700
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.config.stat().st_mode & 0o777 == 0o600
    directory.close()
    assert list((tmp_path / "orch").iterdir()) == []


def test_an_order_waits_for_a_reader_that_comes_later(tmp_path: Path) -> None:
    directory = NodeDirectory(tmp_path / "orch", "run.0.n0")
    directory.order(b"U")
    reader = os.open(directory.leash, os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 10) == b"U"
    directory.close()
    assert os.read(reader, 10) == b"", "letting go reads as EOF"
    os.close(reader)


def test_a_living_owner_s_directory_is_not_swept_and_a_killed_one_s_is(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from orchestrator.worker.node import NodeDirectory\n"
        "NodeDirectory(Path(sys.argv[1]), 'dead').write_config({'env': {'SECRET': 'x'}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "orch"], check=False)
    assert (tmp_path / "orch" / "dead" / "config.json").exists()
    living = NodeDirectory(tmp_path / "orch", "living")
    assert not (tmp_path / "orch" / "dead").exists(), "starting an attempt sweeps what others left"
    assert sweep(tmp_path / "orch") == []
    assert living.path.exists()
    living.close()


def test_somebody_else_s_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "orch").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        NodeDirectory(tmp_path / "orch", "run")


def test_a_link_that_takes_a_directory_s_place_while_we_look_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of /dev/shm can swap the two between two looks."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "orch").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(PermissionError):
        NodeDirectory(tmp_path / "orch", "run.0")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_place_can_be_chosen(tmp_path: Path) -> None:
    assert node_root({"ORCH_NODE_DIR": str(tmp_path)}).parent == tmp_path
    assert node_root({}).name == f"orch-{os.getuid()}"


def test_agents_that_start_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.worker.node import NodeDirectory\n"
        "for n in range(150): NodeDirectory(Path(sys.argv[1]), f'{sys.argv[2]}.{n}').close()"
    )
    agents = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "orch", name]) for name in "abc"]
    assert [agent.wait(timeout=60) for agent in agents] == [0, 0, 0]


def test_what_a_killed_removal_left_is_swept_without_its_lock(tmp_path: Path) -> None:
    (tmp_path / "orch" / "half-removed").mkdir(parents=True)
    (tmp_path / "orch" / "half-removed" / "config.json").write_text("{}")
    (tmp_path / "orch" / "a-file-of-somebody").write_text("")
    assert sweep(tmp_path / "orch") == ["half-removed"]


def test_an_attempt_lives_while_its_agent_holds_its_directory(tmp_path: Path) -> None:
    root = tmp_path / "orch"
    directory = NodeDirectory(root, "run.3.n0.77")
    assert attempt_lives(root, "run", 3)
    assert not attempt_lives(root, "run", 2)
    assert not attempt_lives(root, "ru[n]", 3)
    assert not attempt_lives(tmp_path / "nowhere", "run", 3)
    directory.close()
    assert not attempt_lives(root, "run", 3)
