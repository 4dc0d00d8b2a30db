"""`--set a.b=c`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import JobSpec, parse_spec
from orchestrator.spec.site import SiteProfile

DIGEST = "sha256:" + "0" * 64
BASE: dict[str, Any] = {
    "name": "x",
    "job": {"module": "m", "args": {"lr": 1, "optim": {"beta": 1}, "a.b": 2}},
    "container": {"runtime": "docker", "image": DIGEST, "mounts": [{"source": "/a", "target": "/a"}]},
}


def with_set(*overrides: str) -> JobSpec:
    return parse_spec(BASE, overrides=overrides, base_dir=Path("/base"), environ={})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5", 5),
        ("007", 7),
        ("'5'", "5"),
        ('"5"', "5"),
        ("true", True),
        ("on", "on"),
        ("null", None),
        ("", None),
        ("''", ""),
        ("[a, 1]", ["a", 1]),
        ("{a: 1e-3}", {"a": 0.001}),
        ("a: b", "a: b"),
        ("# text", "# text"),
        ("- x", "- x"),
        ("a=b=c", "a=b=c"),
        ("*x", "*x"),
        ("&x", "&x"),
        ("!x", "!x"),
        ("it's", "it's"),
        ("'", "'"),
        ("-", "-"),
        ("---", "---"),
        ("...", "..."),
        ("?", "?"),
        ("|", "|"),
        ("%a", "%a"),
        ("@a", "@a"),
        (" padded ", " padded "),
        ("two\nlines", "two\nlines"),
        ("é", "é"),
        ("-.inf", None),
    ],
)
def test_values(text: str, value: Any) -> None:
    if text == "-.inf":
        with pytest.raises(SpecError, match="no JSON number"):
            with_set(f"job.args.new={text}")
        return
    given_value = with_set(f"job.args.new={text}").job.args["new"]
    assert given_value == value
    assert type(given_value) is type(value)


@pytest.mark.parametrize(
    ("override", "args"),
    [
        ("job.args.lr=2", {"lr": 2, "optim": {"beta": 1}, "a.b": 2}),
        ("job.args.optim.beta=2", {"lr": 1, "optim": {"beta": 2}, "a.b": 2}),
        ("job.args.optim.new.x=2", {"lr": 1, "optim": {"beta": 1, "new": {"x": 2}}, "a.b": 2}),
        ("job.args.a.b=3", {"lr": 1, "optim": {"beta": 1}, "a.b": 3}),
        ("job.args.model.depth=3", {"lr": 1, "optim": {"beta": 1}, "a.b": 2, "model.depth": 3}),
        ("job.args={z: 1}", {"z": 1}),
        ("job.args=", {}),
    ],
)
def test_argument_paths(override: str, args: dict[str, Any]) -> None:
    assert with_set(override).job.args == args


def test_everything_else() -> None:
    spec = with_set(
        "resources.nodes=4",
        "resources.time=4:00:00",
        "env.N=007",
        "slurm.nodelist=007",
        "slurm.extra_sbatch.mem-bind=local",
        "slurm.extra_sbatch.overcommit=true",
        "container.mounts.0.source=data",
        "tags=[a, b]",
        "notes=x",
        "notes=y: z",
    )
    assert spec.resources.nodes == 4
    assert spec.resources.time == 4 * 3600
    assert spec.env == {"N": "007"}
    assert spec.slurm.options() == {"nodelist": "007", "mem-bind": "local", "overcommit": None}
    assert spec.container.mounts[0].source == "/base/data"
    assert spec.tags == ("a", "b")
    assert spec.notes == "y: z"  # the later wins


def test_over_the_site_profile() -> None:
    spec = parse_spec(
        BASE, overrides=["slurm.partition=", "slurm.account=mine"], site=SiteProfile(partition="p", account="a")
    )
    assert (spec.slurm.partition, spec.slurm.account) == (None, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resources.tme=1h", "--set resources.tme  resources.tme: unknown key. Did you mean `time`?"),
        ("resources.nodes=zero", '--set resources.nodes  resources.nodes: expected a whole number; got text ("zero")'),
        ("resources", "--set  expected KEY=VALUE"),
        ("=x", "--set  expected KEY=VALUE"),
        ("a..b=x", "--set  expected KEY=VALUE"),
        ("name.x=1", "--set name.x  name.x: name is text, nothing can be set in it"),
        ("container.mounts.5.source=x", "there is no container.mounts.5"),
        ("container.mounts.5=x", "the list has 1 entries"),
        ("container.mounts.x=1", "the list has 1 entries"),
        ("tags=[a", "--set tags  tags: not valid YAML"),
        ("notes='a'b'", "--set notes  notes: not valid YAML"),
        ("notes=a\0b", "NUL"),
        ("tags=[a, 1]", "--set tags  tags.1: expected text"),
        ("job.args.é=1", "an argument's name"),
        ("sweep.x=1", "comes in a later version"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        with_set(override)
    assert message in str(caught.value)
