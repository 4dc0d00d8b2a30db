"""What is installed is what works: the wheel holds every package, template and starter."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_wheel_contains_everything_that_is_needed(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(REPOSITORY))
        for package in ("orchestrator", "jobs", "slurm_templates")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix in {".py", ".j2", ".yaml", ".typed"} and "__pycache__" not in path.parts
    }
    assert len(wanted) > 100
    assert wanted <= names
    assert {name.split("/")[0] for name in names if not name.startswith("orch-")} == {
        "orchestrator",
        "jobs",
        "slurm_templates",
    }
