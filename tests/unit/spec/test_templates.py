"""What `orch init` writes is valid as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import load_spec
from orchestrator.spec.templates import TEMPLATES, render_template, suggest_name


@pytest.mark.parametrize("name", TEMPLATES)
def test_valid_as_it_is(name: str, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "folder" # {x}: é'
    folder.mkdir()
    path = folder / "first.yaml"
    path.write_text(render_template(name, "first", file="first.yaml", directory=folder), encoding="utf-8")
    spec = load_spec(path, environ={})
    assert (spec.name, spec.backend, spec.container.runtime) == ("first", "local", "none")
    assert "@" not in path.read_text(encoding="utf-8").replace("@sha256", "")
    if name == "digits":
        assert spec.job.args["data"] == str(folder / "data" / "digits")
        assert (spec.job.module, spec.job.args["method"]) == ("jobs.pretrain", "simclr")


@pytest.mark.parametrize("run_name", ["2024", "true", "1e3", "a.b"])
def test_names_that_yaml_would_misread(run_name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(render_template("command", run_name))
    assert load_spec(path, environ={}).name == run_name


def test_unknown_template() -> None:
    with pytest.raises(SpecError, match="Did you mean `digits`"):
        render_template("digit", "x")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("simclr.yaml", "simclr"),
        ("my spec.yaml", "my-spec"),
        ("é.yaml", "run"),
        ("/a/b/.x.yaml", "x"),
        ("a" * 99, "a" * 64),
    ],
)
def test_suggested_name(file: str, name: str) -> None:
    assert suggest_name(file) == name
