"""A rank's own directory on the node: private, emptied, gone with its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import CheckpointError
from orchestrator.worker.scratch import remove_scratch, scratch_directory

PROGRAM = """
import sys
from pathlib import Path
from orchestrator.worker.scratch import scratch_directory
(scratch_directory(sys.argv[1], run_id="run-1", run_dir=Path("/r"), attempt=0, rank=0) / "file").write_text("x")
"""


def make(parent: Path, attempt: int = 0, rank: int = 0, run_dir: Path = Path("/shared/runs/run-1")) -> Path:
    return scratch_directory(str(parent), run_id="run-1", run_dir=run_dir, attempt=attempt, rank=rank)


def test_it_is_empty_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    first = make(tmp_path)
    (first / "left").write_text("x")
    again = make(tmp_path)
    assert again == first
    assert list(again.iterdir()) == []
    assert first.stat().st_mode & 0o777 == first.parent.stat().st_mode & 0o777 == 0o700


def test_what_older_attempts_left_goes_and_the_other_ranks_stay(tmp_path: Path) -> None:
    old, sibling = make(tmp_path, attempt=0), make(tmp_path, attempt=1, rank=1)
    make(tmp_path, attempt=1)
    assert not old.exists()
    assert sibling.exists()


def test_removing_the_last_one_removes_the_run_directory_too(tmp_path: Path) -> None:
    one, two = make(tmp_path, rank=0), make(tmp_path, rank=1)
    remove_scratch(one)
    assert two.exists()
    remove_scratch(two)
    assert list(tmp_path.iterdir()) == []


def test_it_goes_with_its_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_it_is_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = scratch_directory(None, run_id="run-1", run_dir=Path("/r"), attempt=0, rank=0)
    assert made.is_relative_to(tmp_path)


def test_a_run_of_the_same_name_under_another_root_has_its_own(tmp_path: Path) -> None:
    (make(tmp_path) / "staged").write_text("x")
    other = make(tmp_path, run_dir=Path("/elsewhere/runs/run-1"))
    assert other != make(tmp_path, run_dir=Path("/somewhere/runs/run-1"))
    assert len(list(tmp_path.glob("*/*/staged"))) == 1


@pytest.mark.parametrize("somebody", ["open to all", "a link", "a file"])
def test_a_name_that_somebody_else_took_is_refused(tmp_path: Path, somebody: str) -> None:
    taken = make(tmp_path).parent
    remove_scratch(make(tmp_path))
    match somebody:
        case "open to all":
            taken.mkdir()
            taken.chmod(0o777)
        case "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            taken.symlink_to(tmp_path / "elsewhere")
        case _:
            taken.write_text("")
    with pytest.raises(CheckpointError):
        make(tmp_path)


def test_a_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no scratch directory below"):
        make(tmp_path / "missing")
