"""What makes a run this run (PROTOCOLS 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.identity import attempt_number, canonical_json, rendezvous_port, run_id
from orchestrator.spec import parse_spec

BASE: dict[str, Any] = {
    "name": "run",
    "job": {"module": "train", "args": {"lr": 0.1, "seed": 0}},
    "env": {"A": "1"},
    "container": {"runtime": "docker", "image": "registry.example/a@sha256:" + "a" * 64},
}
CODE = "c" * 32


def name_of(code: str = CODE, ordinal: int = 1, **changes: Any) -> str:
    return run_id(parse_spec({**BASE, **changes}, base_dir=Path("/w")), code, ordinal)


def test_the_name_is_the_spec_s_name_and_ten_hex_digits() -> None:
    name, _, digest = name_of().rpartition("-")
    assert name == "run"
    assert len(digest) == 10
    assert int(digest, 16) >= 0


def test_a_known_name_never_changes() -> None:
    # A changed hash would orphan every run of every user: bump HASH_VERSION on purpose, never by accident.
    assert name_of() == "run-b091338727"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"job": {"module": "train", "args": {"lr": 0.2, "seed": 0}}},
        {"job": {"module": "train", "args": {"lr": "0.1", "seed": 0}}},
        {"job": {"module": "train", "args": {"lr": 0.1, "seed": 0}, "argv": ["x"]}},
        {"job": {"command": ["train"], "args": {"lr": 0.1, "seed": 0}}},
        {"env": {"A": "2"}},
        {"container": {"runtime": "docker", "image": "registry.example/a@sha256:" + "b" * 64}},
        {"container": {"runtime": "none"}},
    ],
)
def test_other_work_is_another_run(changes: dict[str, Any]) -> None:
    assert name_of(**changes) != name_of()


def test_other_code_is_another_run() -> None:
    assert name_of(code="d" * 32) != name_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "local"},
        {"root": "/elsewhere"},
        {"resources": {"nodes": 4, "mem": "9G"}},
        {"torchrun": {"nproc_per_node": 8}},
        {"slurm": {"partition": "p", "setup": ["module load x"]}},
        {"checkpoint": {"every_steps": 7, "uri": "/c"}},
        {"preemption": {"max_requeues": 1}},
        {"retry": {"failure": 3}},
        {"secrets": ["TOKEN"]},
        {"tags": ["t"]},
        {"notes": "n"},
        # The same bytes under another repository name are the same image.
        {"container": {"runtime": "docker", "image": "mirror.example/b@sha256:" + "a" * 64}},
        {"container": {**BASE["container"], "mounts": [{"source": "/d", "target": "/d"}]}},
        {"job": {"args": {"seed": 0, "lr": 0.1}, "module": "train"}},
    ],
)
def test_where_and_how_it_runs_does_not_matter(changes: dict[str, Any]) -> None:
    assert name_of(**changes) == name_of()


def test_the_first_copy_has_no_ordinal() -> None:
    assert name_of(ordinal=2) == f"{name_of()}-2"


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_canonical_json_does_not_depend_on_order(value: dict[str, Any]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_is_no_json(value: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": value})


def test_nodes_agree_on_attempt_and_port() -> None:
    assert attempt_number(3, 2) == 5
    ports = {rendezvous_port("run", attempt, "7") for attempt in range(50)}
    assert all(20000 <= port < 30000 for port in ports)
    assert len(ports) > 45
