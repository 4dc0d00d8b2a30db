"""The plan beyond the script: the agents' orders, and templates of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.plan import Plan, render_plan
from orchestrator.spec import parse_spec


def plan(directory: Path, *, nonce: str = "0", **changes: Any) -> Plan:
    spec = {"name": "run", "backend": "slurm", "job": {"module": "m", "args": {"a": 1}, "argv": ["b"]}, **changes}
    return render_plan(
        parse_spec(spec, base_dir=directory),
        run_id="run-0123456789",
        root=directory / "orch",
        code_hash="c" * 32,
        library_hash="d" * 32,
        python="/venv/bin/python",
        nonce=nonce,
    )


def test_the_printed_plan_is_what_will_be_submitted(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.script in str(made)
    assert made.agent_json in str(made)
    assert json.loads(made.agent_json) == made.agent


@pytest.mark.parametrize(
    ("job", "kind", "argv"),
    [
        ({"module": "m", "args": {"a": 1}, "argv": ["b"]}, "module", ["-m", "m", "--a=1", "b"]),
        ({"command": ["ls", "-l"], "args": {"a": "x y"}, "argv": ["b"]}, "command", ["ls", "-l", "--a=x y", "b"]),
    ],
)
def test_arguments_follow_whichever_program_it_is(tmp_path: Path, job: Any, kind: str, argv: list[str]) -> None:
    program = plan(tmp_path, job=job).agent["program"]
    assert program == {"kind": kind, "argv": argv}


def test_secrets_go_by_name_only(tmp_path: Path) -> None:
    assert plan(tmp_path, secrets=["TOKEN"]).agent["secrets"] == ["TOKEN"]


def test_checkpoints_of_a_run_lie_below_its_name(tmp_path: Path) -> None:
    own = plan(tmp_path).agent["checkpoint"]["uri"]
    assert own == str(tmp_path / "orch" / "runs" / "run-0123456789" / "checkpoints")
    for uri in ("/shared/ckpt", "/shared/ckpt/", "file:///shared/ckpt"):
        assert plan(tmp_path, checkpoint={"uri": uri}).agent["checkpoint"]["uri"] == "/shared/ckpt/run-0123456789"


def test_two_submissions_of_one_attempt_have_two_tokens(tmp_path: Path) -> None:
    assert plan(tmp_path).token == plan(tmp_path).token
    assert plan(tmp_path).token != plan(tmp_path, nonce="1").token


def test_the_local_backend_has_no_script(tmp_path: Path) -> None:
    assert plan(tmp_path, backend="local").script == ""


def test_a_template_of_the_user_s_own_sees_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "mine.j2").write_text("#!/bin/bash\n# {{ run_id }}\nexec {{ python }}\n")
    assert (
        plan(tmp_path, slurm={"template": "mine.j2"}).script == "#!/bin/bash\n# run-0123456789\nexec /venv/bin/python\n"
    )


@pytest.mark.parametrize("text", ["{{ nobody_knows }}", "{% if %}", None])
def test_a_broken_template_is_a_problem_of_the_spec(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "mine.j2").write_text(text)
    with pytest.raises(SpecError, match=r"slurm\.template.*mine\.j2"):
        plan(tmp_path, slurm={"template": "mine.j2"})


def test_values_that_no_sbatch_line_can_carry_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot write its log"):
        plan(tmp_path / "100%")


def test_a_template_that_would_start_the_job_too_early_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "own.j2"
    template.write_text("#!/bin/bash\ntrue\n")
    spec = {"name": "b", "backend": "slurm", "job": {"module": "m"}, "slurm": {"template": str(template)}}
    arguments: dict[str, Any] = {
        "run_id": "b-1",
        "root": tmp_path,
        "code_hash": "c",
        "library_hash": "d",
        "python": "p",
    }
    render_plan(parse_spec(spec, base_dir=tmp_path), **arguments)
    with pytest.raises(SpecError, match="does not look whether"):
        render_plan(parse_spec({**spec, "after": ["a"]}, base_dir=tmp_path), **arguments)
