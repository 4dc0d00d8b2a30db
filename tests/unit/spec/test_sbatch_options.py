"""`slurm.extra_sbatch` lets everything through but what orch owns, under any spelling sbatch would take for it."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import Slurm, parse_spec
from orchestrator.spec.sbatch_options import OWNED, SHORT, refusal


def options(extra: dict[str, Any]) -> dict[str, str | None]:
    return parse_spec({"name": "x", "job": {"module": "m"}, "slurm": {"extra_sbatch": extra}}).slurm.options()


@pytest.mark.parametrize("name", sorted(OWNED))
def test_owned_options_are_refused_under_every_spelling(name: str) -> None:
    for spelling in (name, f"--{name}", name.replace("-", "_")):
        with pytest.raises(SpecError, match=r"slurm\.extra_sbatch"):
            options({spelling: "x"})


@pytest.mark.parametrize(
    "name", ["job", "out", "err", "outpu", "no-req", "ntasks-per-n", "par", "part", "ti", "signa", "wra"]
)
def test_beginnings_that_sbatch_would_complete(name: str) -> None:
    assert "sbatch would read this as" in str(refusal(name))


@pytest.mark.parametrize("short", sorted(SHORT))
def test_short_forms(short: str) -> None:
    assert refusal(short) is not None
    assert refusal("-" + short) is not None


@pytest.mark.parametrize("key", ["", "-", "--", "a b", "x=y", "x\ny", "é", "mem-bind-", "$(x)", "--x;y", "J x", "Z"])
def test_odd_keys(key: str) -> None:
    with pytest.raises(SpecError, match=r"slurm\.extra_sbatch"):
        options({key: "x"})


def test_passed_through() -> None:
    extra = {
        "mem_bind": "local",
        "--hint": "nomultithread",
        "overcommit": True,
        "time-min": 10,
        "threads-per-core": 1,
        "hold": True,
    }
    assert options(extra) == {
        "hint": "nomultithread",
        "hold": None,
        "mem-bind": "local",
        "overcommit": None,
        "threads-per-core": "1",
        "time-min": "10",
    }


@pytest.mark.parametrize("value", [False, None, [], {}, "", "a\nb", float("nan"), " x"])
def test_odd_values(value: Any) -> None:
    with pytest.raises(SpecError, match=r"slurm\.extra_sbatch\.hint"):
        options({"hint": value})


def test_the_same_option_twice() -> None:
    with pytest.raises(SpecError, match="given twice"):
        options({"mem-bind": "a", "mem_bind": "b"})


def test_every_named_field_is_an_owned_option() -> None:
    """Otherwise one option could be set in two places."""
    fields = {field.replace("_", "-") for field in Slurm.model_fields} - {
        "setup",
        "srun-args",
        "extra-sbatch",
        "template",
        "python",
    }
    assert fields <= set(OWNED)


@pytest.mark.parametrize("word", ["--ntasks=4", "-n4", "-n", "-N2", "--nodes", "--export=ALL", "-K1", "--output=x"])
def test_srun_arguments_of_orch(word: str) -> None:
    with pytest.raises(SpecError, match=r"slurm\.srun_args\.1: .* is set by orch"):
        parse_spec({"name": "x", "job": {"module": "m"}, "slurm": {"srun_args": ["--label", word]}})


@pytest.mark.parametrize("word", ["--cpu-bind=cores", "--label", "-v", "--mpi=pmix", "plain", "-"])
def test_srun_arguments_of_the_user(word: str) -> None:
    spec = parse_spec({"name": "x", "job": {"module": "m"}, "slurm": {"srun_args": [word]}})
    assert spec.slurm.srun_args == (word,)


def test_named_options() -> None:
    spec = parse_spec(
        {
            "name": "x",
            "job": {"module": "m"},
            "slurm": {"mail_type": "END", "nice": 5, "exclusive": True, "nodelist": 7},
        }
    )
    assert spec.slurm.options() == {"mail-type": "END", "nice": "5", "exclusive": None, "nodelist": "7"}
