"""Every free text of a spec arrives unchanged and runs nothing; secrets show nowhere. Real Slurm, real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch

SECRET = "s3cr3t-\"quoted\" 'single' $(touch pwned-secret) `id` ; é\nsecond line"
HOSTILE = [
    "two  spaces and a trailing one ",
    "'single' \"double\" \\backslash\\",
    "; touch pwned; $(touch pwned) `touch pwned` && touch pwned | tee pwned > pwned",
    "first\nsecond\n#SBATCH --time=1\n\ttabbed",
    "# comment {{ 7*7 }} {% if x %} {# y #} ${HOME} $HOME %j %%",
    "ünïcödé 日本 🎉",
    "--flag=value",
    "-",
    "*",
    "~",
    "",
    '{"json": [1, 2]}',
    "null",
    "1e-3",
]
# Writes what it was given where the test can read it; waits so that the test can look at the container and processes.
PROGRAM = """
import json, os, pathlib, sys, time
out = pathlib.Path(os.environ["ORCH_RUN_DIR"]) / "received.json"
seen = {"argv": sys.argv[1:], "env": dict(os.environ), "mounts": {}}
for mount in json.loads(os.environ["MOUNTS"]):
    seen["mounts"][mount] = (pathlib.Path(mount) / "inside").read_text()
out.with_suffix(".tmp").write_text(json.dumps(seen))
out.with_suffix(".tmp").rename(out)
until = time.monotonic() + 60
while not (out.parent / "go-on").exists() and time.monotonic() < until:
    time.sleep(0.05)
"""


def hostile_spec(orch: Orch, runtime: str) -> dict[str, Any]:
    container: dict[str, Any] = {"runtime": "none"}
    targets: list[str] = []
    if runtime == "docker":
        mounts = []
        for number, name in enumerate(["sp ace", "co:lon,comma", "quo'te\"s", "$(touch pwned)", "ü\nnewline"]):
            source = orch.directory / "mounts" / name
            source.mkdir(parents=True)
            (source / "inside").write_text(name)
            mounts.append({"source": str(source), "target": f"/mnt/{number} {name}", "read_only": True})
        targets = [str(mount["target"]) for mount in mounts]
        container = {"runtime": "docker", "image": orch.cluster.image, "mounts": mounts}
    return {
        "name": "hostile",
        "backend": "slurm",
        "job": {
            "command": ["python3", "-c", PROGRAM],
            "args": {f"arg{n}": text for n, text in enumerate(HOSTILE)} | {"number": 1e-3, "list": ["a b", None]},
            "argv": HOSTILE,
        },
        "container": container,
        "env": {f"HOSTILE_{n}": text for n, text in enumerate(HOSTILE)} | {"MOUNTS": json.dumps(targets)},
        "secrets": ["ORCHTEST_SECRET"],
        "tags": HOSTILE[:5],
        "notes": "\n".join(HOSTILE),
        "resources": {"mem": "500M", "time": "00:05:00"},
        "slurm": {"partition": "low"},
    }


@pytest.mark.parametrize("runtime", ["docker", "none"])
def test_hostile_values_arrive_unchanged_and_run_nothing(orch: Orch, cluster: Cluster, runtime: str) -> None:
    spec = hostile_spec(orch, runtime)
    environment = {"ORCHTEST_SECRET": SECRET}
    rendered = orch.call("submit", str(orch.write_spec(spec)), "--dry-run", env=environment)
    assert rendered.returncode == 0, rendered.stderr
    run = orch.submit(spec, env=environment)["run_id"]
    directory = orch.run_dir(run)
    received = directory / "received.json"
    cluster.wait("the program to write what it got", received.exists, timeout=120)
    inspected = "".join(cluster.run("docker", "inspect", name).stdout for name in cluster.containers())
    assert bool(inspected) == (runtime == "docker")
    command_lines = "".join(_read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    assert (directory / "secrets.json").stat().st_mode & 0o777 == 0o600
    (directory / "go-on").touch()
    orch.wait_for_state(run, "completed", timeout=60)

    seen = json.loads(received.read_text())
    received.unlink()
    assert seen["argv"][-len(HOSTILE) :] == HOSTILE
    as_json = {'{"json": [1, 2]}', "null", "1e-3"}  # what would parse as JSON is quoted, so that nothing is lost
    expected = [f"--arg{n}={json.dumps(text) if text in as_json else text}" for n, text in enumerate(HOSTILE)]
    assert seen["argv"][: len(HOSTILE)] == expected
    assert seen["argv"][len(HOSTILE) : len(HOSTILE) + 2] == ["--number=0.001", '--list=["a b",null]']
    assert [seen["env"][f"HOSTILE_{n}"] for n in range(len(HOSTILE))] == HOSTILE
    assert seen["env"]["ORCHTEST_SECRET"] == SECRET
    assert all(target.endswith(f" {content}") for target, content in seen["mounts"].items())
    assert len(seen["mounts"]) == (5 if runtime == "docker" else 0)
    assert [str(path) for path in orch.directory.rglob("pwned*")] == []
    labels = json.loads((directory / "labels.json").read_text())
    assert (labels["tags"], labels["notes"]) == (spec["tags"], spec["notes"])

    secret = SECRET.split()[0]
    assert secret not in rendered.stdout + rendered.stderr + inspected + command_lines
    assert not (directory / "secrets.json").exists()
    everything = [path for path in directory.rglob("*") if path.is_file()]
    assert len(everything) > 5
    assert [str(path) for path in everything if secret in path.read_text(errors="replace")] == []
    assert not any(Path("/dev/shm").glob(f"orch-*/{run}*"))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
