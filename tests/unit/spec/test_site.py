"""The site profile lies beneath every spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import load_site, load_spec, parse_spec
from orchestrator.spec.site import KEYS, SITE_DIR, SiteProfile, resolve_root, site_files

DIGEST = "sha256:" + "0" * 64


def profile(tmp_path: Path, text: str, **environ: str) -> SiteProfile:
    path = tmp_path / "site.yaml"
    path.write_text(text, encoding="utf-8")
    return load_site({"ORCH_SITE_CONFIG": str(path), **environ})


def merged(site: SiteProfile, **spec: Any) -> Any:
    return parse_spec({"name": "x", "job": {"module": "m"}, **spec}, site=site, base_dir=Path("/base"), environ={})


FULL = """
root: /shared/$USER/orch
partition: low
account: lab
runtime: docker
setup: ["module load cuda"]
caches: ~/caches
python: /opt/python/bin/python
"""


def test_every_key(tmp_path: Path) -> None:
    site = profile(tmp_path, FULL, USER="ada", HOME="/home/ada")
    assert site.as_dict() == {
        "root": "/shared/ada/orch",
        "partition": "low",
        "account": "lab",
        "runtime": "docker",
        "setup": ["module load cuda"],
        "caches": "/home/ada/caches",
        "python": "/opt/python/bin/python",
        "sources": [str(tmp_path / "site.yaml")],
    }
    assert set(KEYS) <= set(site.as_dict())
    spec = merged(site, container={"image": DIGEST}, env={"HF_HOME": "/mine"})
    assert spec.root == "/shared/ada/orch"
    assert (spec.slurm.partition, spec.slurm.account, spec.slurm.setup) == ("low", "lab", ("module load cuda",))
    assert spec.slurm.python == "/opt/python/bin/python"
    assert spec.container.runtime == "docker"
    assert spec.env == {
        "HF_HOME": "/mine",
        "XDG_CACHE_HOME": "/home/ada/caches",
        "TORCH_HOME": "/home/ada/caches/torch",
    }
    assert [(mount.source, mount.target, mount.read_only) for mount in spec.container.mounts] == [
        ("/home/ada/caches", "/home/ada/caches", False)
    ]


def test_the_spec_wins(tmp_path: Path) -> None:
    site = profile(tmp_path, FULL, USER="ada", HOME="/home/ada")
    spec = merged(
        site,
        root="runs",
        slurm={"partition": "high", "account": None, "setup": [], "python": None},
        container={"runtime": "none"},
    )
    assert spec.root == "/base/runs"
    assert spec.slurm.partition == "high"
    assert (spec.slurm.account, spec.slurm.setup, spec.slurm.python) == (None, (), None)
    assert spec.container.runtime == "none"
    assert spec.container.mounts == ()


def test_caches_are_not_mounted_twice(tmp_path: Path) -> None:
    site = profile(tmp_path, "caches: /c")
    mounts = [{"source": "/fast", "target": "/c"}]
    spec = merged(site, container={"runtime": "docker", "image": DIGEST, "mounts": mounts})
    assert [mount.source for mount in spec.container.mounts] == ["/fast"]


def test_no_profile_is_fine(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert site_files(environ) == [tmp_path / "orch" / "site.yaml", SITE_DIR / "site.yaml"]
    assert load_site(environ) == SiteProfile() or SITE_DIR.exists()


def test_users_profile_over_the_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.spec.site.SITE_DIR", tmp_path / "etc")
    for folder, text in (("etc", "partition: low\naccount: lab\n"), ("home/orch", "partition: high\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "site.yaml").write_text(text)
    site = load_site({"XDG_CONFIG_HOME": str(tmp_path / "home")})
    assert (site.partition, site.account) == ("high", "lab")
    assert [path.parent.name for path in site.sources] == ["orch", "etc"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "root:\n", "root: null\n"])
def test_empty_profiles(tmp_path: Path, text: str) -> None:
    assert profile(tmp_path, text).root is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: low", "site.yaml:1:1  partitoin: unknown key. Did you mean `partition`?"),
        ("root: relative/path", 'site.yaml:1:7  root: "relative/path" must be an absolute path'),
        ("root: /a/$NOBODY", "uses $NOBODY, which is not set"),
        ("root: [a]", "site.yaml:1:7  root: expected text; got a list"),
        ("runtime: dcoker", "Did you mean `docker`?"),
        ("setup: module load", "expected a list of shell lines; got text"),
        ("setup: [1]", "expected a list of shell lines"),
        ('partition: "a\\nb"', "line break"),
        ("- a", "must be a mapping"),
        ("a: 1\na: 2", "given twice"),
        ("a: [", "not valid YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        profile(tmp_path, text)
    assert message in str(caught.value)


def test_a_named_profile_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the site profile"):
        load_site({"ORCH_SITE_CONFIG": str(tmp_path / "none.yaml")})


def test_problems_point_into_the_profile(tmp_path: Path) -> None:
    """A value that only the models refuse is found where it was written: not in the spec."""
    site = profile(tmp_path, "partition: ' low '\n")
    (tmp_path / "spec.yaml").write_text("name: x\njob: {module: m}\n")
    with pytest.raises(SpecError, match=r"site\.yaml:1:12  slurm\.partition: begins or ends with a space"):
        load_spec(tmp_path / "spec.yaml", site=site, environ={})


def test_root_without_a_spec(tmp_path: Path) -> None:
    assert resolve_root("/flag", {"ORCH_ROOT": "/env"}) == Path("/flag")
    assert resolve_root(None, {"ORCH_ROOT": "/env"}) == Path("/env")
    assert resolve_root(None, {}, base_dir=tmp_path) == tmp_path / "orch_runs"
