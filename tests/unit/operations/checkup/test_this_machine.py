"""Disk, engine, interpreter and node: from facts to findings; and the facts of this machine's own disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.backends.process import CommandMissing, Finished
from orchestrator.errors import SchedulerUnavailable
from orchestrator.operations.checkup.disk import Sight, cache_finding, disk_findings, place_finding, quota_findings
from orchestrator.operations.checkup.engine import engine_findings, node_engine_findings
from orchestrator.operations.checkup.examine import doctor
from orchestrator.operations.checkup.findings import Examined, Family, Finding, Level, SaveSeconds
from orchestrator.operations.checkup.machine import Interpreter, ask_interpreter, limit_findings, python_finding
from orchestrator.operations.checkup.node import NodeAnswer, node_command, node_findings
from orchestrator.worker.probe.disk import DiskFacts, probe_disk
from orchestrator.worker.probe.engine import EngineFacts, probe_container, probe_engine
from orchestrator.worker.probe.node import NodeFacts, meet
from tests.unit.operations.checkup.given import target, words

GOOD = DiskFacts(
    "/shared/orch", "/shared/orch", "", "nfs4", "server:/export", "/shared", 10**12, 10**8, 4.0, 1.0, True,
    True, True, 0.1,
)  # fmt: skip
IMAGE = "sha256:" + "a" * 64
PINNED = "registry.example/x@sha256:" + "a" * 64


# --- disk -------------------------------------------------------------------------------------------------------------
def test_a_real_directory_keeps_every_promise_and_is_left_as_it_was(tmp_path: Path) -> None:
    facts = probe_disk(tmp_path / "not" / "yet")
    assert (facts.error, facts.tried) == ("", str(tmp_path))
    assert (facts.atomic_replace, facts.hard_link, facts.exclusive_create) == (True, True, True)
    assert facts.free_bytes > 0 and facts.fsync_ms is not None and facts.file_system
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_takes_no_files() -> None:
    assert probe_disk(Path("/proc")).error.endswith("(/proc)")


@pytest.mark.parametrize(
    ("changes", "level", "words_"),
    [
        ({}, "ok", "rename is atomic, O_EXCL and hard links work, fsync 4.0 ms (directory 1.0 ms), nfs4"),
        ({"error": "No space left on device (/shared)"}, "bad", "cannot be written: No space left"),
        ({"atomic_replace": False}, "bad", "renaming over a file is not atomic"),
        ({"hard_link": False}, "bad", "no hard links"),
        ({"exclusive_create": False}, "bad", "O_EXCL"),
        ({"dirsync_ms": 2500.0}, "warn", "2500 ms"),
    ],
)
def test_what_a_file_system_must_do(changes: dict[str, object], level: str, words_: str) -> None:
    found = words(disk_findings("root", replace(GOOD, **changes)), "root")
    assert found[0][0] == level
    assert words_ in found[0][1]


@pytest.mark.parametrize(
    ("changes", "level"), [({}, "ok"), ({"free_bytes": 10**9}, "warn"), ({"free_inodes": 9}, "warn")]
)
def test_room_is_bytes_and_inodes(changes: dict[str, object], level: str) -> None:
    assert words(disk_findings("root", replace(GOOD, **changes)), "root")[1][0] == level


@pytest.mark.parametrize(("skew_s", "count"), [(4.9, 2), (-8.0, 3)])
def test_the_file_servers_clock(skew_s: float, count: int) -> None:
    assert len(words(disk_findings("root", replace(GOOD, clock_skew_s=skew_s)), "root")) == count


FAR = Sight("login1", frozenset({"n1", "n2"}))


@pytest.mark.parametrize(
    ("file_system", "mount", "sight", "level"),
    [
        ("nfs4", "/shared", FAR, None),
        ("lustre", "/shared", FAR, None),
        ("tmpfs", "/dev/shm", FAR, "bad"),
        ("overlay", "/", FAR, "bad"),
        ("xfs", "/tmp", FAR, "bad"),
        ("xfs", "/data", FAR, "warn"),
        ("xfs", "/data", replace(FAR, met="n1"), "ok"),
        ("xfs", "/data", replace(FAR, met="login1"), "warn"),  # the node of the job was this machine: no proof
        ("ext4", "/tmp", Sight("login1", frozenset({"login1"})), "ok"),
        ("tmpfs", "/dev/shm", Sight("login1", frozenset({"login1"})), "warn"),
    ],
)
def test_a_root_of_one_machine_is_not_there_on_another(
    file_system: str, mount: str, sight: Sight, level: str | None
) -> None:
    facts = replace(GOOD, tried=f"{mount}/orch", file_system=file_system, mount_point=mount)
    found = place_finding("root", facts, target(), sight)
    assert (None if found is None else found.level.value) == level
    assert place_finding("root", facts, target(backend="local"), sight) is None


def test_a_quota_that_is_nearly_used() -> None:
    text = (
        "Disk quotas for user me (uid 1000): \n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        " server:/export  950*     900     1000    0       10      0       0       0\n"
        " other:/export   1000     0       1000    0       10      0       10      0\n"
    )
    assert words(quota_findings(text, {"root": GOOD}), "root") == [
        ("warn", "your quota of space on server:/export is used to 95 %")
    ]
    assert words(quota_findings("Disk quotas for user me (uid 1000): none\n", {"root": GOOD}), "root") == []


# --- caches -----------------------------------------------------------------------------------------------------------
def spaces(free: int, *places: str) -> Mapping[str, tuple[int, str]]:
    return dict.fromkeys(places, (free, "/"))


def of(base: str) -> tuple[str, ...]:
    return (base, f"{base}/huggingface", f"{base}/torch")


def test_a_small_home_is_no_place_for_downloads() -> None:
    at_home = target(root=Path("/home/me/orch_runs"))
    small = cache_finding(at_home, spaces(5 * 10**9, *of("/home/me/orch_runs/caches")))
    assert small.level is Level.WARN and "in your home directory, where 5.0 GB are free" in small.message
    assert "`caches`" in str(small.fix)


def test_downloads_go_below_the_root_unless_the_site_says_more() -> None:
    found = cache_finding(target(root=Path("/shared/orch")), spaces(10**12, *of("/shared/orch/caches")))
    assert found.level is Level.OK
    assert "/shared/orch/caches/huggingface" in found.message
    chosen = {"XDG_CACHE_HOME": "/shared/c", "HF_HOME": "/shared/c/h"}
    free = spaces(10**12, "/shared/c", "/shared/c/h", "/shared/c/torch")
    assert cache_finding(target(runtime="docker", caches=chosen), free).level is Level.OK


# --- engine -----------------------------------------------------------------------------------------------------------
ENGINE = EngineFacts("", "27.1", "/var/lib/docker", 10**12, True)


@pytest.mark.parametrize(
    ("facts", "changes", "levels"),
    [
        (ENGINE, {"runtime": "docker", "image": IMAGE}, ["ok", "ok"]),
        (ENGINE, {"runtime": None}, ["ok"]),
        (replace(ENGINE, store_free_bytes=10**9), {"runtime": None}, ["warn"]),
        (replace(ENGINE, leftovers=("c0ffee (r-1, attempt 0)",)), {"runtime": None}, ["ok", "warn"]),
        (replace(ENGINE, image_here=False), {"runtime": "docker", "image": PINNED}, ["ok", "warn"]),
        (replace(ENGINE, image_here=False), {"runtime": "docker", "image": IMAGE}, ["ok", "warn"]),
        (replace(ENGINE, image_here=False), {"runtime": "docker", "image": IMAGE, "backend": "local"}, ["ok", "bad"]),
        (EngineFacts(error="none answers"), {"runtime": "docker", "image": IMAGE}, ["warn"]),
        (EngineFacts(error="none answers"), {"runtime": "docker", "image": IMAGE, "backend": "local"}, ["bad"]),
        (EngineFacts(error="none answers"), {"runtime": None}, ["ok"]),
        (EngineFacts(version="enroot 3.5.0"), {"runtime": "pyxis", "image": PINNED}, ["ok"]),
        (EngineFacts(error="node n1 has no enroot"), {"runtime": "pyxis", "image": PINNED}, ["warn"]),
        (EngineFacts(error="no apptainer"), {"runtime": "apptainer", "image": PINNED, "backend": "local"}, ["bad"]),
    ],
)
def test_the_engine_of_this_machine(facts: EngineFacts, changes: dict[str, object], levels: list[str]) -> None:
    assert [finding.level.value for finding in engine_findings(target(**changes), facts)] == levels


@pytest.mark.parametrize(
    ("facts", "image", "last"),
    [
        (replace(ENGINE, container=""), IMAGE, ("ok", "starts, and writes")),
        (replace(ENGINE, container="PermissionError: [Errno 13]"), IMAGE, ("bad", "PermissionError")),
        (replace(ENGINE, image_here=False), IMAGE, ("bad", "an image id cannot be pulled")),
        (replace(ENGINE, image_here=False), PINNED, ("warn", "the first run there pulls it")),
        (EngineFacts(error="none answers"), IMAGE, ("bad", "n1: none answers")),
    ],
)
def test_the_engine_of_a_node(facts: EngineFacts, image: str, last: tuple[str, str]) -> None:
    *_, finding = node_engine_findings(target(runtime="docker", image=image), facts, "n1: ")
    assert finding.level.value == last[0]
    assert last[1] in finding.message
    assert finding.family is Family.CONTAINER


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        (EngineFacts(version="apptainer 1.3.4"), "ok", "n1: apptainer 1.3.4 answers"),
        (EngineFacts(error="node n1 has no apptainer"), "warn", "n1: node n1 has no apptainer"),
    ],
)
def test_a_program_of_a_node_that_may_come_with_a_module(facts: EngineFacts, level: str, said: str) -> None:
    (finding,) = node_engine_findings(target(runtime="apptainer", image=PINNED), facts, "n1: ")
    assert (finding.level.value, finding.message) == (level, said)
    assert (level == "ok") is ("slurm.setup" not in str(finding.fix))


@pytest.mark.parametrize(
    ("runtime", "program", "prints", "version"),
    [
        ("apptainer", "apptainer", "apptainer version 1.3.4-1.el9", "apptainer 1.3.4-1.el9"),
        ("pyxis", "enroot", "3.5.0", "enroot 3.5.0"),
    ],
)
def test_the_program_of_a_runtime_without_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, program: str, prints: str, version: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"has no {program}" in probe_engine(runtime, None).error
    path = tmp_path / program
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)
    assert probe_container(runtime, PINNED, []) == EngineFacts(version=version)
    path.write_text("#!/bin/sh\necho 'no user namespaces' >&2; exit 3\n")
    assert probe_engine(runtime, None).error.endswith("ended with 3: no user namespaces")


def test_the_probe_answers_whatever_is_missing(tmp_path: Path) -> None:
    request = json.dumps(
        {"disks": [str(tmp_path)], "spaces": [str(tmp_path)], "engine": {"runtime": "docker", "image": None}}
    )
    argv = [sys.executable, "-m", "orchestrator.worker.probe", request]
    environ = {**os.environ, "DOCKER_HOST": "unix:///nonexistent"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True, env=environ)
    facts = json.loads(done.stdout)
    assert "no container engine answers at unix:///nonexistent" in facts["engine"]["error"]
    assert DiskFacts(**facts["disks"][0]).error == "" and facts["spaces"][0][0] > 0


# --- interpreter and limits -------------------------------------------------------------------------------------------
def test_this_interpreter_has_orch() -> None:
    from orchestrator.backends.process import run_command

    found = ask_interpreter(sys.executable, run_command)
    assert found.version[:2] == sys.version_info[:2] and found.error == ""
    assert "command not found" in ask_interpreter("/nowhere/python", run_command).error
    assert "does not work" in ask_interpreter("/bin/false", run_command).error


@pytest.mark.parametrize(
    ("found", "changes", "level"),
    [
        (Interpreter((3, 11, 2)), {}, "ok"),
        (Interpreter((3, 9, 18)), {}, "bad"),
        (Interpreter((3, 12, 0), import_error="No module named 'orchestrator'"), {}, "bad"),
        (Interpreter(error="command not found"), {}, "warn"),  # it may be there on the nodes
        (Interpreter(error="command not found"), {"backend": "local"}, "bad"),
    ],
)
def test_the_interpreter_of_the_nodes(found: Interpreter, changes: dict[str, object], level: str) -> None:
    assert python_finding(target(**changes), found).level.value == level


def test_low_limits_are_told() -> None:
    code = (
        "import resource\nfrom orchestrator.operations.checkup.machine import limit_findings\n"
        "print([finding.message for finding in limit_findings()])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "print([finding.message for finding in limit_findings()])\n"
    )
    argv = [sys.executable, "-c", code]
    before, after = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert before == "[]" or list(limit_findings())
    assert "256 open files" in after


# --- a compute node ---------------------------------------------------------------------------------------------------
NODE = NodeFacts("n1", "/opt/python", "3.11.2", "", "/dev/shm/orch-7", "", 10**10, "", 0, (), None)


def node_words(changes: dict[str, object] | None = None, **answer: object) -> list[tuple[str, str]]:
    given = NodeAnswer(replace(NODE, **(changes or {})), (GOOD,), met=True)
    asked = target(gpus_per_node=4)
    return [(finding.level.value, finding.message) for finding in node_findings(asked, replace(given, **answer))]


@pytest.mark.parametrize(
    ("changes", "answer", "level", "words_"),
    [
        ({}, {}, "ok", "n1: sees /shared/orch as the same directory"),
        ({"meeting_error": "No such file or directory"}, {}, "bad", "is not the same directory there (No such"),
        ({}, {"met": False}, "bad", "did not come to be seen here"),
        ({"scontrol_error": "command not found"}, {}, "bad", "is not requeued"),
        ({"node_dir_error": "Permission denied"}, {}, "bad", "/dev/shm/orch-7 cannot be used"),
        ({"shm_bytes": 10**6}, {}, "warn", "bus error"),
        ({"gpus_counted": 4}, {}, "warn", "4 GPUs without saying which"),
        ({"gpus_counted": 1, "gpus_named": ("0",)}, {}, "warn", "no nvidia-smi"),
        ({"gpus_counted": 2, "gpus_named": ("0", "1"), "gpus_seen": 1}, {}, "bad", "nvidia-smi shows 1"),
        ({"gpus_counted": 1, "gpus_named": ("3",), "gpus_seen": 1}, {}, "ok", "1 GPU (3), nvidia-smi shows 1"),
        ({}, {"node": None, "error": "the job did not start"}, "bad", "the job did not start"),
    ],
)
def test_what_a_node_said(changes: dict[str, object], answer: dict[str, object], level: str, words_: str) -> None:
    assert [found for found, message in node_words(changes, **answer) if words_ in message] == [level]


def test_the_nonce_must_be_the_one_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "nonce").write_text("abc")
    assert meet(tmp_path, "abc") == "" and (tmp_path / "answer").read_text() == "abc"
    assert meet(tmp_path, "xyz") == "it holds something else"
    assert meet(tmp_path / "missing", "abc") == "No such file or directory"


def test_the_job_lands_where_the_run_would() -> None:
    asked = target(placing={"partition": "low", "account": "lab"}, gpus_per_node=4)
    argv = node_command(asked, "orch-doctor-1", "{}")
    assert {"--partition=low", "--account=lab", "--gpus-per-node=1", "--chdir=/"} <= set(argv)
    assert argv[-4:] == ["/opt/orch/bin/python", "-m", "orchestrator.worker.probe", "{}"]


# --- the whole --------------------------------------------------------------------------------------------------------
def test_the_exit_code_is_that_of_the_first_bad_finding() -> None:
    def examined(*findings: Finding) -> Examined:
        return Examined(findings, SaveSeconds())

    good, known = Finding("a", Level.OK, "good"), Finding("b", Level.WARN, "known", "do", Family.DISK)
    disk, engine = (Finding("c", Level.BAD, "bad", None, family) for family in (Family.DISK, Family.CONTAINER))
    assert (examined(good, known).exit_code, examined(good, known).ok) == (0, True)
    assert examined(good, disk, engine).exit_code == 6
    assert examined(known).as_json()["findings"] == [{"topic": "b", "level": "warn", "message": "known", "fix": "do"}]


class Machine:
    """A machine on which every program answers as told; the others are not there."""

    def __init__(self, **answers: str | Exception) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def __call__(self, argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None) -> Finished:
        name = Path(argv[0]).name
        self.asked.append(" ".join(argv))
        if name.startswith("python"):
            if argv[1] == "-c":
                return Finished(0, json.dumps([[3, 11, 2], ""]), "")
            request = json.loads(argv[-1])
            return Finished(0, json.dumps(self._probe(request)), "")
        answer = self._answers.get(name, CommandMissing(f"{name}: command not found"))
        if isinstance(answer, Exception):
            raise answer
        return Finished(0, answer, "")

    def _probe(self, request: dict[str, object]) -> dict[str, object]:
        if "spaces" in request:
            return {"spaces": [[10**12, "/"] for _ in of("")]}
        return {"disks": [asdict(GOOD)]} if "disks" in request else {"engine": asdict(ENGINE)}


def environment(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}


def test_without_slurm_the_rest_is_examined(tmp_path: Path) -> None:
    result = doctor(root=tmp_path, environ=environment(tmp_path), run=Machine())
    assert result.ok
    assert [finding.topic for finding in result.findings][:2] == ["slurm", "python"]
    assert "backend: local" in result.findings[0].message


def test_a_spec_for_slurm_needs_slurm(tmp_path: Path) -> None:
    spec = {"name": "x", "job": {"command": ["true"]}, "backend": "slurm"}
    result = doctor(spec, root=tmp_path, environ=environment(tmp_path), run=Machine())
    assert result.exit_code == 3


def test_a_local_spec_asks_no_scheduler(tmp_path: Path) -> None:
    machine = Machine()
    spec = {"name": "x", "job": {"command": ["true"]}, "backend": "local", "preemption": {"lead_time": "30s"}}
    result = doctor(spec, root=tmp_path, environ=environment(tmp_path), run=machine)
    assert result.ok and result.save_seconds.preemption == 30
    assert not [asked for asked in machine.asked if asked.startswith(("scontrol", "sinfo", "sacctmgr"))]


def test_after_one_silence_slurm_is_asked_no_more(tmp_path: Path) -> None:
    machine = Machine(scontrol=SchedulerUnavailable("scontrol gave no answer within 15 s"))
    result = doctor(root=tmp_path, node=True, environ=environment(tmp_path), run=machine)
    assert [finding.topic for finding in result.findings if finding.level is Level.BAD] == ["slurm"]
    assert len([asked for asked in machine.asked if asked.startswith(("scontrol", "sinfo", "srun"))]) == 1


def test_a_dead_file_server_is_one_bad_finding(tmp_path: Path) -> None:
    class Hanging(Machine):
        def _probe(self, request: dict[str, object]) -> dict[str, object]:
            if "disks" in request:
                raise SchedulerUnavailable("python gave no answer within 20 s")
            return super()._probe(request)

    result = doctor(root=tmp_path, environ=environment(tmp_path), run=Hanging())
    assert [finding.message for finding in result.findings if finding.level is Level.BAD] == [
        f"{tmp_path}: the file system gave no answer within 20 s"
    ]
    assert result.exit_code == 6
