"""The code of a run: the right files, a hash of their content, a read-only copy that races and crashes cannot harm."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RegistryError, SpecError
from orchestrator.operations.snapshot import Snapshot, ensure_snapshot, hash_workspace
from orchestrator.paths import RootPaths
from orchestrator.spec import JobSpec, parse_spec

HOSTILE_NAMES = [
    "with space.py",
    "new\nline.py",
    "quo'te\".py",
    "$(x).py",
    "-dash.py",
    "é.py",
    "tab\t.py",
    "#.py",
    "a\\b.py",
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def put(top: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)


def git(top: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", top, *identity, *arguments], check=True, capture_output=True)


def spec_of(work: Path, **more: Any) -> JobSpec:
    return parse_spec({"name": "x", "job": {"module": "m"}, **more}, base_dir=work, environ={})


def snap(work: Path, root: Path | None = None, spec_path: Path | None = None, **more: Any) -> Snapshot:
    return hash_workspace(spec_of(work, **more), spec_path=spec_path, root=root or work.parent / "root")


def names(snapshot: Snapshot) -> list[str]:
    return [file.path for file in snapshot.files]


# --- which files


def test_outside_git_python_files_and_the_script(work: Path) -> None:
    put(work, "a.py", "pkg/b.py", "c.txt", "run.sh", ".hidden/d.py", "venv/pyvenv.cfg", "venv/lib/e.py", "data.bin")
    assert names(snap(work)) == ["a.py", "pkg/b.py"]
    assert names(snap(work, job={"script": "run.sh"})) == ["a.py", "pkg/b.py", "run.sh"]


def test_in_git_what_is_not_ignored(work: Path) -> None:
    git(work, "init", "-q")
    put(work, "tracked.txt", "gone.txt", "sub/tracked.py", "ignored.log", "sub/untracked.cfg", ".hidden/x")
    put(work, ".gitignore", text="*.log\n")
    git(work, "add", "tracked.txt", "gone.txt", "sub/tracked.py")
    (work / "gone.txt").unlink()
    assert names(snap(work)) == [".gitignore", ".hidden/x", "sub/tracked.py", "sub/untracked.cfg", "tracked.txt"]
    assert names(snap(work, workspace={"path": "sub"})) == ["tracked.py", "untracked.cfg"]
    assert "ignored.log" in names(snap(work, job={"script": "ignored.log"}))  # asked for by name


def test_a_directory_that_git_ignores_is_outside_git(work: Path) -> None:
    git(work, "init", "-q")
    put(work, "play/a.py", "play/b.txt")
    put(work, ".gitignore", text="/play/\n")
    assert names(snap(work, workspace={"path": "play"})) == ["a.py"]


def test_never_in_it(work: Path) -> None:
    git(work, "init", "-q")
    put(work, "a.py", "runs/code/x.py", "ck/y.py", "my/spec.yaml", "other.yaml", "notes/n.md", "notes/keep.md")
    snapshot = snap(
        work,
        root=work / "runs",
        spec_path=work / "my" / "spec.yaml",
        checkpoint={"uri": "ck"},
        workspace={"exclude": ["*.md", "!keep.md"]},
    )
    assert names(snapshot) == ["a.py", "notes/keep.md", "other.yaml"]
    assert not any(".git" in Path(name).parts for name in names(snapshot))


def test_the_root_may_be_the_workspace(work: Path) -> None:
    put(work, "a.py", "code/h/a.py", "runs/x/b.py", "sweeps/c.py")
    assert names(snap(work, root=work)) == ["a.py"]


def test_checkpoints_in_the_workspace_itself_are_refused(work: Path) -> None:
    with pytest.raises(SpecError, match="is the workspace itself"):
        snap(work, checkpoint={"uri": "."})


def test_another_root_is_no_code(work: Path) -> None:
    put(work, "a.py", "orch_runs/code/h/a.py", "sub/orch_runs/runs/x/b.py")
    assert names(snap(work)) == ["a.py"]


def test_spec_through_a_link(work: Path) -> None:
    git(work, "init", "-q")
    put(work, "a.py", "spec.yaml")
    (work.parent / "alias").symlink_to(work)
    assert names(snap(work, spec_path=work.parent / "alias" / "spec.yaml")) == ["a.py"]


def test_nothing_at_all(work: Path, tmp_path: Path) -> None:
    snapshot = snap(work)
    assert (snapshot.files, snapshot.size_bytes) == ((), 0)
    stored = ensure_snapshot(snapshot, RootPaths(tmp_path / "root"))
    assert list(stored.iterdir()) == []
    assert ensure_snapshot(snapshot, RootPaths(tmp_path / "root")) == stored


@pytest.mark.parametrize("in_git", [True, False])
def test_hostile_names(work: Path, tmp_path: Path, in_git: bool) -> None:
    if in_git:
        git(work, "init", "-q")
    for name in [os.fsencode(name) for name in HOSTILE_NAMES] + [b"not-utf8-\xff.py"]:
        with open(os.path.join(os.fsencode(work), name), "w") as file:  # noqa: PTH118, PTH123 - bytes
            file.write("x")
    stored = ensure_snapshot(snap(work), RootPaths(tmp_path / "root"))
    copied, given = ({os.fsencode(path.name) for path in folder.iterdir()} for folder in (stored, work))
    assert copied == given - {b".git"}


def test_submodules_and_inner_repositories(work: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init", "-q")
    put(library, "lib.py")
    git(library, "add", ".")
    git(library, "commit", "-qm", "x")
    git(work, "init", "-q")
    git(work, "submodule", "add", "-q", str(library), "vendor/lib")
    put(work, "inner/i.py", "inner/skip.log", "a.py", "vendor/lib/new.py")
    put(work, "inner/.gitignore", text="*.log\n")
    git(work / "inner", "init", "-q")
    assert names(snap(work)) == [
        ".gitmodules", "a.py", "inner/.gitignore", "inner/i.py", "vendor/lib/lib.py", "vendor/lib/new.py"
    ]  # fmt: skip


def test_a_surrounding_git_does_not_redirect_ours(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(work, "init", "-q")
    put(work, "a.txt")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert names(snap(work)) == ["a.txt"]


def no_git(_argv: Sequence[str], _timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    raise FileNotFoundError("git")


def slow_git(argv: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    raise subprocess.TimeoutExpired(list(argv), timeout_s)


def angry_git(argv: Sequence[str], _timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    words = b"fatal: detected dubious ownership\n\tgit config --global --add safe.directory /work\n"
    return subprocess.CompletedProcess(list(argv), 128, b"", words)


@pytest.mark.parametrize(
    ("runner", "message", "hint"),
    [
        (no_git, "there is no git here", "Install git"),
        (slow_git, "within 60 s", "gitignore"),
        (angry_git, "dubious ownership", "safe.directory"),
    ],
)
def test_git_that_does_not_answer(work: Path, runner: Any, message: str, hint: str) -> None:
    git(work, "init", "-q")
    with pytest.raises(SpecError, match=message) as caught:
        hash_workspace(spec_of(work), spec_path=None, root=work / "r", runner=runner)
    assert hint in str(caught.value.hint)


def test_missing_workspace_and_script(work: Path) -> None:
    with pytest.raises(SpecError, match=r"workspace\.path: .* is not a directory"):
        snap(work, workspace={"path": "nowhere"})
    with pytest.raises(SpecError, match=r"job\.script: there is no file"):
        snap(work, job={"script": "t.py"})
    put(work, "t.py")
    with pytest.raises(SpecError, match=r"job\.script: t\.py is excluded"):
        snap(work, job={"script": "t.py"}, workspace={"exclude": ["t.*"]})


def test_bad_exclude_pattern(work: Path) -> None:
    with pytest.raises(SpecError, match=r"workspace\.exclude: '\[z-a\]' is not a pattern"):
        snap(work, workspace={"exclude": ["[z-a]"]})


def test_too_large_names_the_biggest(work: Path) -> None:
    put(work, "small.py")
    put(work, "big.py", text="x" * 3_000_000)
    put(work, "bigger.py", text="x" * 5_000_000)
    with pytest.raises(
        SpecError, match=r"7\.6 MiB; workspace\.max_size is 4M\. The biggest: bigger\.py \(4\.8 MiB\), big\.py"
    ):
        snap(work, workspace={"max_size": "4M"})


@pytest.mark.skipif(os.geteuid() == 0, reason="user: root reads everything")
def test_unreadable_file(work: Path) -> None:
    put(work, "a.py")
    (work / "a.py").chmod(0)
    with pytest.raises(SpecError, match="cannot read"):
        snap(work)


# --- symbolic links


def test_links(work: Path, tmp_path: Path) -> None:
    git(work, "init", "-q")
    put(work, "pkg/a.py", "ignored.txt")
    put(work, ".gitignore", text="ignored.txt\n")
    put(tmp_path, "outside.py", text="outside")
    (work / "relative.py").symlink_to("pkg/a.py")
    (work / "absolute.py").symlink_to(work / "pkg" / "a.py")
    (work / "around.py").symlink_to("../work/pkg/a.py")
    (work / "pkg" / "up").symlink_to("..")
    (work / "pkg" / "top").symlink_to(work)
    (work / "folder").symlink_to("pkg")
    (work / "copied.py").symlink_to(tmp_path / "outside.py")
    (work / "ignored-too.txt").symlink_to("ignored.txt")
    (work / "dangling").symlink_to("/nowhere/at/all")
    (work / "loop").symlink_to("loop")
    stored = ensure_snapshot(snap(work), RootPaths(tmp_path / "root"))
    shutil.rmtree(work)
    (tmp_path / "outside.py").unlink()
    for name in ("relative.py", "absolute.py", "around.py"):
        assert os.readlink(stored / name) == "pkg/a.py"  # noqa: PTH115
    assert (stored / "folder" / "a.py").read_text() == "x"
    assert (stored / "pkg" / "up" / "pkg" / "a.py").read_text() == "x"
    assert (stored / "pkg" / "top" / "pkg" / "a.py").read_text() == "x"
    assert (stored / "copied.py").read_text() == "outside"
    assert not (stored / "copied.py").is_symlink()
    assert (stored / "ignored-too.txt").read_text() == "x"
    assert os.readlink(stored / "dangling") == "/nowhere/at/all"  # noqa: PTH115


def test_a_link_to_a_directory_outside_is_refused(work: Path, tmp_path: Path) -> None:
    git(work, "init", "-q")
    (tmp_path / "data").mkdir()
    (work / "data").symlink_to(tmp_path / "data")
    with pytest.raises(SpecError, match="a directory outside the workspace"):
        snap(work)
    assert names(snap(work, workspace={"exclude": ["/data"]})) == []


def test_a_directory_replaced_by_a_link(work: Path) -> None:
    git(work, "init", "-q")
    put(work, "old/a.py", "new/a.py")
    git(work, "add", ".")
    shutil.rmtree(work / "old")
    (work / "old").symlink_to("new")
    assert names(snap(work)) == ["new/a.py", "old"]


# --- the hash


def test_the_hash_is_the_content(work: Path, tmp_path: Path) -> None:
    put(work, "a.py", "b/c.py")
    first = snap(work)
    os.utime(work / "a.py", (0, 0))
    (work / "empty").mkdir()
    assert snap(work).code_hash == first.code_hash
    shutil.copytree(work, tmp_path / "copy")
    assert snap(tmp_path / "copy").code_hash == first.code_hash
    assert snap(work, workspace={"exclude": ["nothing"]}).code_hash == first.code_hash
    assert len(first.code_hash) == 32


def test_every_change_changes_the_hash(work: Path) -> None:
    put(work, "a.py", "b.py")
    seen = {snap(work).code_hash}

    def changed() -> None:
        code_hash = snap(work).code_hash
        assert code_hash not in seen
        seen.add(code_hash)

    put(work, "a.py", text="y")
    changed()
    (work / "a.py").chmod(0o755)
    changed()
    (work / "a.py").rename(work / "c.py")
    changed()
    put(work, "d.py", text="")
    changed()
    (work / "d.py").unlink()
    (work / "d.py").symlink_to("b.py")
    changed()
    (work / "d.py").unlink()
    (work / "d.py").symlink_to("c.py")
    changed()


def test_names_and_contents_do_not_run_together(work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    put(work, "a.py", text="bc")
    put(other, "a.pyb.py", text="c")
    assert snap(work).code_hash != snap(other).code_hash


# --- storing


def test_stored_read_only_and_complete(work: Path, tmp_path: Path) -> None:
    put(work, "a.py", "pkg/deep/b.py", "run.py")
    (work / "run.py").chmod(0o755)
    root = RootPaths(tmp_path / "root")
    snapshot = snap(work)
    stored = ensure_snapshot(snapshot, root)
    assert stored == root.snapshot(snapshot.code_hash)
    modes = {str(path.relative_to(stored)): stat.S_IMODE(path.stat().st_mode) for path in [stored, *stored.rglob("*")]}
    assert all(mode & 0o222 == 0 for mode in modes.values())
    assert modes["run.py"] & 0o100
    assert not modes["a.py"] & 0o111
    assert list(root.code.iterdir()) == [stored]  # nothing temporary is left
    assert snap(stored).code_hash == snapshot.code_hash


def test_the_copy_outlives_the_workspace(work: Path, tmp_path: Path) -> None:
    put(work, "m.py", text="print('old')")
    stored = ensure_snapshot(snap(work), RootPaths(tmp_path / "root"))
    put(work, "m.py", text="print('new')")
    done = subprocess.run([sys.executable, "-B", "-m", "m"], cwd=stored, capture_output=True, text=True, check=True)
    assert done.stdout == "old\n"


def test_storing_twice_writes_once(work: Path, tmp_path: Path) -> None:
    put(work, "a.py")
    root = RootPaths(tmp_path / "root")
    stored = ensure_snapshot(snap(work), root)
    before = (stored / "a.py").stat().st_ino
    put(work, "a.py", text="changed afterwards")
    put(work, "a.py", text="x")
    ensure_snapshot(snap(work), root)
    assert (stored / "a.py").stat().st_ino == before


def test_racing_submits(work: Path, tmp_path: Path) -> None:
    put(work, *(f"m{number}.py" for number in range(40)))
    root = RootPaths(tmp_path / "root")
    snapshot = snap(work)
    gate = threading.Barrier(6)
    stored: list[Path] = []

    def submit() -> None:
        gate.wait()
        stored.append(ensure_snapshot(snapshot, root))

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored == [root.snapshot(snapshot.code_hash)] * 6
    assert list(root.code.iterdir()) == stored[:1]
    assert snap(stored[0]).code_hash == snapshot.code_hash


def test_what_a_killed_submit_left_is_swept(work: Path, tmp_path: Path) -> None:
    put(work, "a.py")
    root = RootPaths(tmp_path / "root")
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    host = socket.gethostname()
    dead = root.code / f".tmp.{int(done.stdout)}.aaaa.{host}"
    alive = root.code / f".tmp.{os.getpid()}.bbbb.{host}"
    elsewhere = root.code / ".tmp.1.cccc.another-host"
    forgotten = root.code / ".tmp.1.dddd.another-host"
    for left in (dead, alive, elsewhere, forgotten):
        put(left, "pkg/a.py")
        (left / "pkg").chmod(0o555)
        left.chmod(0o555)
    os.utime(forgotten, (0, 0))
    ensure_snapshot(snap(work), root)
    assert not dead.exists()
    assert not forgotten.exists()
    assert alive.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_file_that_changes_in_between(work: Path, tmp_path: Path, change: str) -> None:
    put(work, "a.py", "b.py")
    snapshot = snap(work)
    if change == "edited":
        put(work, "b.py", text="other")
    else:
        (work / "b.py").unlink()
    root = RootPaths(tmp_path / "root")
    with pytest.raises(SpecError, match=r"b\.py changed while it was copied"):
        ensure_snapshot(snapshot, root)
    assert list(root.code.iterdir()) == []


def test_a_root_that_cannot_be_written(work: Path, tmp_path: Path) -> None:
    put(work, "a.py")
    put(tmp_path, "file")
    with pytest.raises(RegistryError, match="cannot store the code snapshot") as caught:
        ensure_snapshot(snap(work), RootPaths(tmp_path / "file"))
    assert "--root" in str(caught.value.hint)
