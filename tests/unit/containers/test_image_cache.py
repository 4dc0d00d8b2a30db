"""Imported image files: made once, found again, and never half. The programs that make them are small stand-ins."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.containers import image_cache
from orchestrator.containers.image_cache import ImageCache, import_command
from orchestrator.errors import ContainerError

HASH = "0123456789abcdef" * 4
PIN = f"ghcr.io/lab/train@sha256:{HASH}"

PULL = """#!/bin/sh
echo pull >>"$CALLS"
{before}
echo squashed >"$2"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageCache:
    monkeypatch.setattr(image_cache, "_LOCK_LOOK_S", 0.01)
    stub(tmp_path)
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    return ImageCache(tmp_path / "images", environ)


def stub(tmp_path: Path, before: str = "") -> None:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir(exist_ok=True)
    program.write_text(PULL.format(before=before))
    program.chmod(0o755)


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("image", "runtime", "source"),
    [
        (PIN, "apptainer", f"docker://ghcr.io/lab/train@sha256:{HASH}"),
        (f"train@sha256:{HASH}", "apptainer", f"docker://train@sha256:{HASH}"),
        (PIN, "pyxis", f"docker://ghcr.io#lab/train:sha256:{HASH}"),
        (f"localhost:5000/a/b@sha256:{HASH}", "pyxis", f"docker://localhost:5000#a/b:sha256:{HASH}"),
        (f"lab/train@sha256:{HASH}", "pyxis", f"docker://lab/train:sha256:{HASH}"),
        (f"train@sha256:{HASH}", "pyxis", f"docker://library/train:sha256:{HASH}"),
        (f"docker.io/lab/train@sha256:{HASH}", "pyxis", f"docker://lab/train:sha256:{HASH}"),
    ],
)
def test_what_is_asked_for(image: str, runtime: str, source: str) -> None:
    command = import_command(image, runtime, Path("/c/x.sif"))
    head = ["apptainer", "pull", "/c/x.sif"] if runtime == "apptainer" else ["enroot", "import", "--output=/c/x.sif"]
    assert command == [*head, source]


@pytest.mark.parametrize("variable", ["TMPDIR", "APPTAINER_TMPDIR"])
def test_layers_are_where_the_site_says_and_go_with_the_import(tmp_path: Path, variable: str) -> None:
    """A program's own variable would win over what its configuration file says, so one that is not set stays unset."""
    note = f'echo "$TMPDIR|$APPTAINER_TMPDIR" >"{tmp_path}/said"; touch "${variable}/layer"'
    stub(tmp_path, before=note)
    environ = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), variable: f"{tmp_path}/room"}
    ImageCache(tmp_path / "images", environ).fetch(PIN, "apptainer")
    said = dict(zip(("TMPDIR", "APPTAINER_TMPDIR"), (tmp_path / "said").read_text().strip().split("|"), strict=True))
    assert said.pop(variable).startswith(f"{tmp_path}/room/.orch-import-")
    assert list(said.values()) == [""]
    assert list((tmp_path / "room").iterdir()) == []


def test_imported_once_and_found_again(cache: ImageCache, tmp_path: Path) -> None:
    assert cache.find(PIN, "apptainer") is None
    first = cache.fetch(PIN, "apptainer")
    assert first.path == tmp_path / "images" / f"{HASH}.sif"
    assert first.path.read_text() == "squashed\n"
    assert first.problem() is None
    os.utime(first.description, (1, 1))
    again = cache.fetch(PIN, "apptainer")
    assert (again.path, again.sha256, calls(tmp_path)) == (first.path, first.sha256, 1)
    (listed,) = cache.entries()
    assert listed.image == PIN
    assert time.time() - listed.used_at < 60, "whoever takes it uses it"


FETCH = """
import fcntl, sys, time
from pathlib import Path
from orchestrator.containers.image_cache import ImageCache, _waiting
cache = ImageCache(Path(sys.argv[1]))
if sys.argv[3:]:
    with _waiting(cache.path(sys.argv[2], "apptainer"), fcntl.LOCK_EX):
        Path(sys.argv[3]).touch()
        time.sleep(60)
print(cache.fetch(sys.argv[2], "apptainer").path)
"""


def process(cache: ImageCache, *arguments: str) -> subprocess.Popen[str]:
    """Another one, as on another node: a lock of fcntl is a process's."""
    command = [sys.executable, "-c", FETCH, str(cache.directory), PIN, *arguments]
    return subprocess.Popen(command, env={**os.environ, **cache._environ}, stdout=subprocess.PIPE, text=True)


def test_many_ask_at_once_and_one_imports(cache: ImageCache, tmp_path: Path) -> None:
    stub(tmp_path, "sleep 0.3")
    asking = [process(cache) for _ in range(4)]
    told = [asked.communicate(timeout=60)[0].strip() for asked in asking]
    assert told == [str(cache.path(PIN, "apptainer"))] * 4
    assert calls(tmp_path) == 1


def test_one_that_was_cut_short_is_imported_again(cache: ImageCache, tmp_path: Path) -> None:
    path = cache.fetch(PIN, "apptainer").path
    path.write_text("squ")
    assert cache.find(PIN, "apptainer") is None
    (listed,) = cache.entries()
    assert listed.problem() == "its import was cut short, or its description is damaged"
    assert cache.fetch(PIN, "apptainer").path.read_text() == "squashed\n"


def test_a_damaged_one_is_found_by_whoever_is_to_verify_it(cache: ImageCache, tmp_path: Path) -> None:
    entry = cache.fetch(PIN, "apptainer")
    entry.path.write_text("squaShed\n")
    assert "its SHA-256 is" in (entry.problem() or "")
    assert cache.fetch(PIN, "apptainer").path.read_text() == "squaShed\n"
    assert cache.fetch(PIN, "apptainer", verify=True).path.read_text() == "squashed\n"
    assert calls(tmp_path) == 2


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"image": "x", "sha256": "y", "size_bytes": "z"}'])
def test_a_damaged_description_is_none(cache: ImageCache, tmp_path: Path, content: str) -> None:
    cache.fetch(PIN, "apptainer").description.write_text(content)
    assert [entry.sha256 for entry in cache.entries()] == [""]
    assert cache.fetch(PIN, "apptainer").problem() is None
    assert calls(tmp_path) == 2


def test_many_may_verify_at_once(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own the readers would queue up behind an exclusive lock."""
    cache.fetch(PIN, "apptainer")
    kinds: list[int] = []
    real = fcntl.lockf
    monkeypatch.setattr(fcntl, "lockf", lambda fd, kind: (kinds.append(kind & ~fcntl.LOCK_NB), real(fd, kind)))
    cache.fetch(PIN, "apptainer", verify=True)
    assert kinds == [fcntl.LOCK_SH]


def test_another_user_s_cache_can_be_read(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.fetch(PIN, "apptainer")

    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "utime", refused)
    assert cache.fetch(PIN, "apptainer").image == PIN
    with pytest.raises(ContainerError, match=r"cannot keep other@.*Permission denied"):
        cache.fetch(f"other@sha256:{HASH[::-1]}", "apptainer")


def test_a_failed_import_leaves_nothing(cache: ImageCache, tmp_path: Path) -> None:
    stub(tmp_path, 'echo half >"$2"; echo "FATAL: manifest unknown" >&2; exit 255')
    with pytest.raises(ContainerError, match=f"cannot pull {PIN} on node .*manifest unknown"):
        cache.fetch(PIN, "apptainer")
    assert calls(tmp_path) == 1, "what the registry does not have it will not have in a second either"
    assert [path.name for path in (tmp_path / "images").iterdir() if not path.name.endswith(".lock")] == []


def test_what_may_pass_is_tried_again(cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageCache._run.retry, "wait", lambda _: 0.0)  # type: ignore[attr-defined]
    stub(tmp_path, '[ "$(wc -l <"$CALLS")" -gt 2 ] || { echo "read: connection reset by peer" >&2; exit 1; }')
    assert cache.fetch(PIN, "apptainer").path.exists()
    assert calls(tmp_path) == 3
    stub(tmp_path, 'echo "503 Service Unavailable" >&2; exit 1')
    with pytest.raises(ContainerError, match="503 Service Unavailable"):
        cache.fetch(f"other@sha256:{HASH[::-1]}", "apptainer")
    assert calls(tmp_path) == 3 + 5
    stub(tmp_path, 'echo "denied" >&2; exit 1')
    with pytest.raises(ContainerError, match="denied"):
        cache.fetch(f"lab/timeout-503@sha256:{HASH[::-1]}", "apptainer")
    assert calls(tmp_path) == 3 + 5 + 1, "what counts is what the registry says"


def test_an_import_that_hangs_is_ended(cache: ImageCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "_IMPORT_S", 0.3)
    stub(tmp_path, "sleep 600 & sleep 600")
    begin = time.monotonic()
    with pytest.raises(ContainerError, match="does not answer") as caught:
        cache.fetch(PIN, "apptainer")
    assert time.monotonic() - begin < 30
    assert f"orch image pull {PIN} --runtime apptainer" in (caught.value.hint or "")


def test_without_the_program(cache: ImageCache, tmp_path: Path) -> None:
    (tmp_path / "bin" / "apptainer").unlink()
    with pytest.raises(ContainerError, match="has no apptainer"):
        cache.fetch(PIN, "apptainer")


def test_one_that_is_being_imported_is_not_removed(cache: ImageCache, tmp_path: Path) -> None:
    entry = cache.fetch(PIN, "apptainer")
    with process(cache, str(tmp_path / "held")) as holder:
        until = time.monotonic() + 60
        while not (tmp_path / "held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not cache.remove(entry)
        holder.kill()
    used = cache.fetch(PIN, "apptainer")
    assert not cache.remove(replace(entry, used_at=0.0)), "it has been used since"
    assert cache.remove(cache.entries()[0]), "a lock ends with its holder"
    assert used.path == entry.path
    assert cache.entries() == []
    assert not entry.path.exists()
