"""The contract of container runtimes, on the real engines: what the agent asks of one, and what it must get."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.containers.payload import Mount, Payload, PayloadRequest, Runtime, open_engine
from orchestrator.containers.process import ProcessRuntime
from orchestrator.errors import ContainerError
from orchestrator.worker.node_agent import step_limits
from tests.cluster.handle import Cluster

DEADLINE_S = 60
ENGINES = ("docker", "podman")
ODD = "odd: a,b \"c\" 'd' $(e) \\ ü\n=f"
HOSTILE = {"A": "b \"c\" 'd' $(e) `f` \\ ü", "LINES": "a\nb=c\n", "EMPTY": "", "COMMA": "a,b=c"}


class Bench:
    """One runtime, and what was started with it."""

    def __init__(self, name: str, cluster: Cluster, directory: Path) -> None:
        self.name = name
        self.cluster = cluster
        self.directory = directory / "run"
        self.directory.mkdir()
        self.scratch = directory / "scratch"
        self.scratch.mkdir()
        environ = {**os.environ, **cluster.overrides}
        self.runtime: Runtime = ProcessRuntime() if name == "none" else open_engine(name, environ)
        self.started: list[Payload] = []

    def start(self, program: str, **changes: Any) -> Payload:
        request = self.request(program, **changes)
        self.runtime.prepare(request)
        payload = self.runtime.start(request)
        self.started.append(payload)
        return payload

    def request(self, program: str, **changes: Any) -> PayloadRequest:
        contained = self.name != "none"
        fields: dict[str, Any] = {
            "argv": ("python3", "-c", program),
            "cwd": "/",
            "run_id": "run-0123456789",
            "run_dir": str(self.directory),
            "attempt": 3,
            "node": "n1",
            "image": self.cluster.image if contained else None,
            "mounts": (Mount(str(self.directory), str(self.directory)),),
            "mem_bytes": 512 * 1024**2,
            "cpus": 1,
            "cpuset": "",
            "host_network": False,
            "verify_image": True,
            "images": self.directory,
            "devices": (),
            "gpus": (),
            "scratch": self.scratch,
            "log": self.directory / "log",
        }
        return PayloadRequest(**{**fields, **changes})

    def end_of(self, payload: Payload) -> int:
        wait_until(lambda: payload.poll() is not None)
        code = payload.poll()
        assert code is not None
        return code

    def containers(self) -> list[str]:
        return self.cluster.containers() if self.name == "docker" else self.cluster.podman_containers()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(params=[*ENGINES, "none"])
def bench(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[Bench]:
    yield from opened(request.param, cluster, tmp_path)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[Bench]:
    yield from opened(request.param, cluster, tmp_path)


def opened(name: str, cluster: Cluster, directory: Path) -> Iterator[Bench]:
    made = Bench(name, cluster, directory)
    yield made
    for payload in made.started:
        payload.kill()
        payload.close()


def test_the_exit_code_is_the_first_process_s(bench: Bench) -> None:
    go = bench.directory / "go"
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.05)"
    payload = bench.start(f"import os, time\n{wait}\nraise SystemExit(75)")
    assert payload.poll() is None
    go.touch()
    assert bench.end_of(payload) == 75
    assert payload.poll() == 75


def test_a_killed_one_is_dead_and_so_is_what_it_started(bench: Bench) -> None:
    sign = bench.directory / "alive"
    endless = f"import time, pathlib\nwhile True: pathlib.Path({str(sign)!r}).touch(); time.sleep(0.05)"
    payload = bench.start(f"import subprocess; subprocess.run(['python3', '-c', {endless!r}])")
    wait_until(sign.exists)
    payload.kill()
    assert bench.end_of(payload) == 137
    sign.unlink()
    time.sleep(0.3)  # a survivor would have made it again
    assert not sign.exists()


def test_what_it_said_is_kept_until_it_is_closed(engine: Bench) -> None:
    payload = engine.start("import sys; print('out'); print('err', file=sys.stderr)")
    assert engine.end_of(payload) == 0
    assert set(payload.early_output().split()) == {"out", "err"}
    payload.close()
    assert engine.containers() == []
    payload.close()  # whoever tidies up may come twice


def test_leftovers_of_older_attempts_of_this_run_on_this_node_are_ended(engine: Bench) -> None:
    program = "import time; time.sleep(600)"
    old = engine.start(program, attempt=2)
    for changes in ({}, {"attempt": 2, "node": "n2"}, {"attempt": 2, "run_dir": f"{engine.directory}-2"}):
        engine.start(program, **changes)
    removed = engine.runtime.remove_leftovers(str(engine.directory), "n1", 3)
    assert list(removed) == [old.describe()["container"]]
    assert engine.end_of(old) == 137
    assert [payload.poll() for payload in engine.started[1:]] == [None, None, None]


def test_mounts_with_every_character_a_path_may_have(engine: Bench) -> None:
    source = engine.directory / ODD
    source.mkdir()
    (source / "given").write_text("x")
    target = f"/mnt/{ODD}"
    mounts = (Mount(str(source), target), Mount(str(source), "/mnt/fixed", read_only=True))
    program = (
        f"import os, pathlib; place = pathlib.Path({target!r})\n"
        "(place / 'made').write_text((place / 'given').read_text())\n"
        "try: pathlib.Path('/mnt/fixed/no').touch()\n"
        "except OSError as error: raise SystemExit(error.errno)"
    )
    payload = engine.start(program, mounts=mounts)
    assert engine.end_of(payload) == 30, payload.early_output()  # EROFS
    assert (source / "made").read_text() == "x"
    assert (source / "made").stat().st_uid == os.getuid()
    assert sorted(path.name for path in source.iterdir()) == ["given", "made"]


def test_a_missing_source_is_named_and_not_made(engine: Bench) -> None:
    missing = engine.directory / "missing"
    with pytest.raises(ContainerError, match="a mount's source is missing on node n1") as caught:
        engine.start("", mounts=(Mount(str(missing), "/x"),))
    assert "missing" in caught.value.message
    assert not missing.exists()
    assert engine.containers() == []


def test_values_of_the_environment_arrive_as_they_are(engine: Bench) -> None:
    program = f"import os; raise SystemExit({HOSTILE!r} != {{name: os.environ[name] for name in {list(HOSTILE)!r}}})"
    assert engine.end_of(engine.start(program, environ=HOSTILE)) == 0


def test_it_gets_what_the_step_has_and_no_more(engine: Bench) -> None:
    program = (
        "import os, resource, pathlib\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1234, 1234)\n"
        "assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (65536, 65536)\n"
        "shm = os.statvfs('/dev/shm'); assert shm.f_blocks * shm.f_frsize == 256 << 20\n"
        "assert os.access(os.environ['HOME'], os.W_OK) and os.environ['HOME'] != '/'\n"
        f"assert (os.getuid(), os.getgid()) == ({os.getuid()}, {os.getgid()})\n"
        "assert os.getpid() == 1"
    )
    payload = engine.start(program, limits={**step_limits(), "nofile": 1234, "memlock": 65536})
    assert engine.end_of(payload) == 0, payload.early_output()


def test_it_runs_on_the_processors_of_the_step(engine: Bench) -> None:
    last = max(os.sched_getaffinity(0))
    program = f"import os; assert os.sched_getaffinity(0) == {{{last}}}, os.sched_getaffinity(0)"
    payload = engine.start(program, cpuset=str(last))
    assert engine.end_of(payload) == 0, payload.early_output()


def test_what_the_step_s_environment_holds_stays_outside(engine: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies come with passwords: one gets in when a spec declares it (`env`, `secrets`), and not by itself."""
    names = ["HTTPS_PROXY", "http_proxy", "NO_PROXY", "HF_HUB_OFFLINE", "WANDB_API_KEY"]
    for name in names:
        monkeypatch.setenv(name, "http://user:password@127.0.0.1:1")
    engine.runtime = open_engine(engine.name, {**os.environ, **engine.cluster.overrides})
    program = f"import os; raise SystemExit(any(name in os.environ for name in {names!r}))"
    assert engine.end_of(engine.start(program)) == 0
    declared = {"HTTPS_PROXY": "http://127.0.0.1:2"}
    program = "import os; raise SystemExit(os.environ['HTTPS_PROXY'] != 'http://127.0.0.1:2')"
    assert engine.end_of(engine.start(program, environ=declared)) == 0


def test_too_much_memory_ends_it(engine: Bench) -> None:
    payload = engine.start("x = bytearray(1 << 30)", mem_bytes=64 * 1024**2)
    assert engine.end_of(payload) == 137
    assert payload.out_of_memory()


def test_an_end_of_another_kind_is_no_lack_of_memory(engine: Bench) -> None:
    payload = engine.start("import os, signal; os.kill(os.getpid(), signal.SIGTERM); raise SystemExit(137)")
    assert engine.end_of(payload) == 137
    assert not payload.out_of_memory()


def test_an_image_without_the_program(engine: Bench) -> None:
    with pytest.raises(ContainerError, match="has no python9") as caught:
        engine.start("", argv=("python9", "-c", ""))
    assert "python3" in str(caught.value.hint)
    assert engine.containers() == []


def test_a_program_for_another_processor(engine: Bench) -> None:
    program = engine.directory / "program"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 57)
    program.chmod(0o755)
    try:  # the OCI runtime either refuses to start it, or has already said that it started
        payload = engine.start("", argv=(str(program),))
    except ContainerError as error:
        assert "was built for another processor" in error.message
    else:
        assert engine.end_of(payload) != 0
        assert "exec format error" in payload.early_output()


def test_an_image_that_is_not_there(engine: Bench) -> None:
    with pytest.raises(ContainerError, match="a local image id cannot be pulled"):
        engine.start("", image="sha256:" + "0" * 64)
    with pytest.raises(ContainerError, match=r"cannot pull 127\.0\.0\.1:1/nothing"):
        engine.start("", image="127.0.0.1:1/nothing@sha256:" + "0" * 64)
