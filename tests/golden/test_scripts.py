"""The batch script, byte by byte. After a wanted change:  ORCH_ACCEPT=1 pytest tests/golden  and read the diff."""

from __future__ import annotations

import difflib
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import render_plan
from orchestrator.spec import parse_spec

SCRIPTS = Path(__file__).parent / "scripts"
DIGEST = "sha256:" + "0" * 64
HOSTILE = "a b 'c' \"d\" ;e $(touch pwned) `id` #f {{ g }} {% h %} é\nsecond line"

CASES: dict[str, dict[str, Any]] = {
    "minimal": {"name": "tiny", "backend": "slurm", "job": {"module": "jobs.pretrain"}},
    "two_nodes_docker": {
        "name": "digits-simclr",
        "backend": "slurm",
        "job": {"module": "jobs.pretrain", "args": {"data": "/data/digits", "epochs": 4}},
        "container": {"runtime": "docker", "image": DIGEST},
        "resources": {"nodes": 2, "cpus_per_task": 4, "gpus_per_node": 2, "mem": "2G", "time": "00:30:00"},
        "slurm": {
            "partition": "low",
            "constraint": "a100|h100",
            "setup": ["module load cuda/12", "export X='1 2'"],
            "srun_args": ["--cpu-bind=cores", "--label"],
            "extra_sbatch": {"hint": "nomultithread", "overcommit": True},
        },
        "torchrun": {"nproc_per_node": 2},
        "preemption": {"signal": "USR2", "lead_time": "90s"},
    },
    "after": {
        "name": "second",
        "job": {"module": "jobs.pretrain"},
        "slurm": {"dependency": "afterok:1", "setup": ["module load cuda/12"]},
        "after": ["first-0123456789", "other-0123456789"],
    },
    "hostile": {
        "name": "hostile",
        "backend": "slurm",
        "job": {"command": ["echo", HOSTILE], "argv": [HOSTILE], "args": {"text": HOSTILE}},
        "env": {"HOSTILE": HOSTILE},
        "slurm": {"srun_args": ["--label", "a b;$(id)"], "reservation": "a \"b\" #c $(id) 'd' \\e"},
        "tags": [HOSTILE],
        "notes": HOSTILE,
    },
}


def script_of(case: dict[str, Any], root: str = "/shared/orch") -> str:
    plan = render_plan(
        parse_spec(case, base_dir=Path("/work")),
        run_id=f"{case['name']}-0123456789",
        root=Path(root),
        code_hash="c" * 32,
        library_hash="d" * 32,
        python="/opt/venv/bin/python",
        after_jobs=["41", "42"] if case.get("after") else (),
    )
    return plan.script


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_accepted_one(name: str) -> None:
    golden = SCRIPTS / f"{name}.sbatch"
    script = script_of(CASES[name])
    if os.environ.get("ORCH_ACCEPT"):
        golden.write_text(script)
    accepted = golden.read_text()
    diff = "".join(
        difflib.unified_diff(accepted.splitlines(True), script.splitlines(True), "accepted", "rendered", n=1)
    )
    assert script == accepted, f"\n{diff}\nWanted?  ORCH_ACCEPT=1 .venv/bin/pytest tests/golden"


@pytest.mark.parametrize("name", CASES)
def test_script_is_clean_shell(name: str, tmp_path: Path) -> None:
    path = tmp_path / "script.sbatch"
    path.write_text(script_of(CASES[name], root="/shared/o'rch $(id) é"))
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"  # of the environment that runs the tests
    found = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_same_spec_same_bytes() -> None:
    case = CASES["two_nodes_docker"]
    assert script_of(case) == script_of(dict(reversed(case.items())))


def test_no_free_text_of_the_user_reaches_the_script() -> None:
    script = script_of(CASES["hostile"])
    assert "touch pwned" not in script
