"""Building images: what a lock must say, what the tools are asked for, what is said when one fails."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.errors import ContainerError, SpecError
from orchestrator.operations import image_build
from orchestrator.operations.image_build import (
    Build,
    build_image,
    cache_dir,
    choose_builder,
    default_tag,
    download_argv,
    ensure_wheels,
    lock_problems,
    podman_argv,
    read_hashed_lock,
    revision_of,
    run_told,
    wheels_name,
)
from orchestrator.spec.images import LOCK_FILE

CONTAINERS = Path(__file__).resolve().parents[3] / "containers"
HASH = f"--hash=sha256:{'a' * 64}"
PIN = f"ghcr.io/lab/debian@sha256:{'b' * 64}"
STUB = """\
#!{python}
import pathlib, sys
if {fails}:
    print("first\\nERROR: no such file", file=sys.stderr)
    raise SystemExit(125)
print("STEP 1/1: FROM x")
pathlib.Path({seen!r}).write_text("\\n".join(sys.argv[1:]))
context = pathlib.Path(sys.argv[-1])
files = sorted(str(path.relative_to(context)) for path in context.rglob("*") if path.is_file())
pathlib.Path({seen!r} + ".files").write_text("\\n".join(files))
for wheel in context.glob("project/*.whl"):
    pathlib.Path({seen!r} + ".wheel").write_bytes(wheel.read_bytes())
next(pathlib.Path(a.split("=", 1)[1]) for a in sys.argv if a.startswith("--iidfile=")).write_text("sha256:" + "c" * 64)
"""


class Place:
    """A directory to build, a wheel that pip finds without a network, and a podman that only writes down."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.directory = top / "train"
        self.directory.mkdir()
        self.cache = top / "cache"
        self.seen = top / "seen"
        self.wheel = made_wheel(top / "offered")
        self.environ: Mapping[str, str] = {
            "PATH": f"{top / 'bin'}:{os.defpath}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheel.parent),
        }
        self.lock(hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        self.dockerfile("FROM scratch\n")
        self.stub("podman")

    def lock(self, digest: str, requirement: str = "tiny==1.0") -> None:
        (self.directory / "requirements.lock").write_text(f"{requirement} \\\n    --hash=sha256:{digest}\n")

    def dockerfile(self, text: str) -> None:
        (self.directory / "Dockerfile").write_text(text)

    def stub(self, name: str, *, fails: bool = False) -> None:
        path = self.top / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB.format(python=sys.executable, seen=str(self.seen), fails=fails))
        path.chmod(0o755)

    def build(self, **options: object) -> image_build.BuiltImage:
        given = {"environ": self.environ, "cache": self.cache, **options}
        return build_image(self.directory, **given)  # type: ignore[arg-type]

    def wheels(self) -> Path:
        return ensure_wheels(read_hashed_lock(self.directory / "requirements.lock"), self.cache, environ=self.environ)


def made_wheel(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny.py", "")
        file.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- locks


@pytest.mark.parametrize(
    "text",
    [
        f"a==1 {HASH}\n",
        f"# made by a tool\na==1 \\\n    {HASH} \\\n    {HASH}\n    # via b\n\nb.c_d[x,y]==2.0+cpu {HASH}  # local",
        f'a==1 ; python_version < "3.12" \\\n    {HASH}\n',
        f"a==1 \\\n{HASH} \\\n",
    ],
)
def test_a_lock_with_hashes(text: str) -> None:
    assert lock_problems(text) == []


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "it pins nothing"),
        ("# nothing\n", 1, "it pins nothing"),
        (f"a==1 {HASH}\nb==2\n", 2, "b==2 has no --hash=sha256:"),
        ("a==1 --hash=sha256:12\n", 1, "is not NAME==VERSION"),
        ("a==1 --hash=md5:0123\n", 1, "is not NAME==VERSION"),
        (f"a>=1 {HASH}\n", 1, "a>=1 is not NAME==VERSION"),
        (f"a {HASH}\n", 1, "a is not NAME==VERSION"),
        (f"a==1,<2 --no-binary=a {HASH}\n", 1, "is not NAME==VERSION"),
        (f"a @ https://example.org/a.whl {HASH}\n", 1, "is not NAME==VERSION"),
        (f"\n\n--index-url https://u:secret@example.org\na==1 {HASH}\n", 3, "the option --index-url"),
        ("-r other.lock\n", 1, "the option -r"),
        ("-e .\n", 1, "the option -e"),
    ],
)
def test_what_is_no_lock_with_hashes(text: str, line: int, words: str) -> None:
    found = lock_problems(text)
    assert [number for number, _ in found] == [line]
    assert words in found[0][1]
    assert "secret" not in found[0][1]


def test_the_first_problem_is_told_and_all_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "requirements.lock"
    path.write_text("a==1\nb==2\n")
    with pytest.raises(SpecError, match=r"requirements\.lock:1: a==1 has no --hash.* \(and 1 more\)") as caught:
        read_hashed_lock(path)
    assert [problem["line"] for problem in caught.value.problems] == [1, 2]
    assert "--generate-hashes" in str(caught.value.hint)


def test_a_lock_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the lock"):
        read_hashed_lock(tmp_path / "requirements.lock")
    (tmp_path / "requirements.lock").write_bytes(b"\xff")
    with pytest.raises(SpecError, match="cannot read the lock"):
        read_hashed_lock(tmp_path / "requirements.lock")


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ ;+]+)", read_hashed_lock(path).data.decode(), re.MULTILINE))


def test_the_locks_of_this_repository_agree() -> None:
    gpu, cpu = (pins(CONTAINERS / "pretrain" / name) for name in ("requirements.lock", "requirements-cpu.lock"))
    base = pins(CONTAINERS / "base" / "requirements.lock")
    assert {"torch", "lightning", "kornia", "s3fs"} <= cpu.keys()
    assert cpu.items() <= gpu.items()
    assert {"timm", "torchvision", "nvidia-nccl-cu13"} <= gpu.keys() - cpu.keys()
    assert {name: base[name] for name in base.keys() & cpu.keys()}.items() <= cpu.items()
    assert not any("://" in path.read_text() for path in CONTAINERS.glob("*/*.lock"))


@pytest.mark.parametrize("name", ["base", "pretrain"])
def test_the_apptainer_files_install_as_the_dockerfiles_do(name: str) -> None:
    command = re.compile(r"(export PYTHONH|/tmp/|python3 |rm |if |\$|install=)")
    installing = []
    for file in ("Dockerfile", "apptainer.def"):
        words = (CONTAINERS / name / file).read_text().replace("\\\n", " ").replace("&&", "\n").replace("RUN ", "\n")
        lines = [" ".join(line.split()) for line in words.splitlines()]
        installing.append([line for line in lines if command.match(line)])
    assert installing[0] == installing[1]
    assert len(installing[0]) > 4


# --- what the tools are asked for


def test_pip_takes_wheels_for_the_image_whatever_machine_it_runs_on(tmp_path: Path) -> None:
    argv = download_argv(tmp_path / "lock", tmp_path / "wheels")
    assert argv[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:", "--python-version=3.11"} <= set(argv)
    platforms = [word for word in argv if word.startswith("--platform=")]
    assert platforms[0].startswith("--platform=manylinux_2_36_")
    assert not any("musl" in word or "2_37" in word for word in platforms)


def test_podman_is_told_to_leave_out_when_and_where(tmp_path: Path) -> None:
    build = Build(tmp_path, "a/b:c", "base@x", {"l": "v w"}, {}, print)
    argv = podman_argv(build, tmp_path / "id")
    assert argv[:2] == ["podman", "build"]
    assert argv[-1] == str(tmp_path)
    assert {"--network=none", "--no-cache", "--timestamp=0", "--identity-label=false"} <= set(argv)
    assert {"--tag=a/b:c", "--label=l=v w", "--build-arg=BASE=base@x"} <= set(argv)
    assert not any("BASE" in word for word in podman_argv(Build(tmp_path, "t", None, {}, {}, print), tmp_path))


def test_which_builder(place: Place) -> None:
    assert choose_builder(None, place.environ) == "podman"
    assert choose_builder("docker", place.environ) == "docker"
    (place.top / "bin" / "podman").unlink()
    without = {**place.environ, "PATH": str(place.top / "bin")}
    assert choose_builder(None, without) == "docker"
    with pytest.raises(ContainerError, match="podman is not installed"):
        choose_builder("podman", without)
    with pytest.raises(SpecError, match="no builder buildkit"):
        choose_builder("buildkit", without)


def test_the_tag_names_directory_and_lock(place: Place) -> None:
    lock = read_hashed_lock(place.directory / "requirements.lock")
    assert default_tag(place.directory, lock) == f"orch/train:{lock.sha256[:12]}"
    with pytest.raises(SpecError, match="is no name for an image"):
        default_tag(Path("/My Images"), lock)


def test_where_wheels_are_kept(tmp_path: Path) -> None:
    assert cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "orch"
    assert cache_dir({}).name == "orch"
    assert wheels_name("0" * 64).startswith("wheels-0000000000000000-")


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    argv = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_the_commit_of_what_is_built(place: Place) -> None:
    environ = {**os.environ, "GIT_CEILING_DIRECTORIES": str(place.top.parent), "GIT_DIR": "/nonexistent"}
    assert revision_of(place.directory, None, environ) == ""
    git(place.top, "init", "--quiet")
    assert revision_of(place.directory, None, environ) == ""
    git(place.top, "add", "train")
    git(place.top, "commit", "--quiet", "--message=x")
    head = git(place.top, "rev-parse", "HEAD")
    assert revision_of(place.directory, None, environ) == head  # others' files beside it do not count
    assert revision_of(place.directory, place.top, environ) == f"{head}-dirty"
    (place.directory / "Dockerfile").write_text("FROM other\n")
    assert revision_of(place.directory, None, environ) == f"{head}-dirty"
    assert revision_of(place.directory, None, {"PATH": "/nonexistent"}) == ""


# --- wheels


def test_wheels_are_downloaded_once(place: Place) -> None:
    wheels = place.wheels()
    assert [path.name for path in wheels.iterdir()] == [place.wheel.name]
    shutil.rmtree(place.wheel.parent)
    assert place.wheels() == wheels
    assert [path.name for path in place.cache.iterdir()] == [wheels.name]


def test_a_wheel_with_another_hash_is_not_kept(place: Place) -> None:
    place.lock("d" * 64)
    with pytest.raises(ContainerError, match=r"not the one that .*requirements\.lock pins") as caught:
        place.wheels()
    assert "d" * 64 in caught.value.message
    assert list(place.cache.iterdir()) == []


def test_a_wheel_that_nobody_offers(place: Place) -> None:
    place.lock("d" * 64, "tiny==2.0+cpu")
    with pytest.raises(ContainerError, match="finds no wheel") as caught:
        place.wheels()
    assert "tiny==2.0+cpu" in caught.value.message
    assert "PIP_FIND_LINKS" in str(caught.value.hint)


# --- the whole


def test_an_image_is_built_of_dockerfile_lock_and_wheels(place: Place) -> None:
    (place.directory / "notes.txt").touch()
    heard: list[str] = []
    done = place.build(tell=heard.append)
    lock = read_hashed_lock(place.directory / "requirements.lock")
    assert done.as_json() == {
        "image": f"sha256:{'c' * 64}",
        "tag": f"orch/train:{lock.sha256[:12]}",
        "builder": "podman",
        "reproducible": True,
        "lock_sha256": lock.sha256,
        "revision": "",
    }
    files = (place.top / "seen.files").read_text().split()
    assert files == ["Dockerfile", "requirements.lock", f"wheels/{place.wheel.name}"]
    assert f"--label=orch.lock.sha256={lock.sha256}" in place.seen.read_text().splitlines()
    assert heard[-1] == "STEP 1/1: FROM x"
    assert [path.name for path in place.cache.iterdir()] == [wheels_name(lock.sha256)]


def test_another_lock_has_the_usual_name_in_the_build(place: Place) -> None:
    other = place.directory / "requirements-cpu.lock"
    (place.directory / "requirements.lock").rename(other)
    assert place.build(lock=other, tag="x").tag == "x"
    assert "requirements.lock" in (place.top / "seen.files").read_text().split()


def test_the_base_is_an_image_or_a_name(place: Place) -> None:
    place.dockerfile("ARG BASE\nFROM ${BASE}\n")
    with pytest.raises(SpecError, match="no base image was named"):
        place.build()
    (place.top / LOCK_FILE).parent.mkdir()
    (place.top / LOCK_FILE).write_text(f'{{"version": 1, "images": {{"bookworm": {{"image": "{PIN}"}}}}}}')
    for given, meant in (("bookworm", PIN), ("some/thing:1", "some/thing:1")):
        place.build(base=given)
        assert f"--build-arg=BASE={meant}" in place.seen.read_text().splitlines()


def test_a_project_s_wheel_is_the_same_whenever_it_is_built(place: Place) -> None:
    place.dockerfile("FROM scratch\nCOPY project /project\n")
    with pytest.raises(SpecError, match=r"no pyproject\.toml is above it"):
        place.build()
    (place.top / "own.py").write_text("x = 1\n")
    (place.top / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "own"\nversion = "1"\n[tool.hatch.build]\ninclude = ["own.py"]\n'
    )
    wheels = []
    for time in (1_000_000_000, 1_700_000_000):
        os.utime(place.top / "own.py", (time, time))
        place.build()
        wheels.append((place.top / "seen.wheel").read_bytes())
    assert wheels[0] == wheels[1]
    (place.top / "pyproject.toml").write_text("[project]\nname = 1\n")
    with pytest.raises(ContainerError, match="no wheel can be built"):
        place.build()


def test_a_build_that_fails_says_its_last_words(place: Place) -> None:
    place.stub("podman", fails=True)
    with pytest.raises(ContainerError, match=r"podman build failed:\nfirst\nERROR: no such file"):
        place.build()
    assert [path.name for path in place.cache.iterdir()] == [place.wheels().name]


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (["[1/2] STEP 1/4: FROM nope AS installed", "Error: creating build container"], "--base names an image"),
        (["Step 1/9 : FROM nope", "pull access denied"], "--base names an image"),
        (["[1/2] STEP 1/4: FROM x", "[1/2] STEP 2/4: RUN false", "Error: exit status 1"], "has no network"),
        (["STEP 2/4: RUN pip", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"], "remove the directory"),
    ],
)
def test_what_to_do_about_a_build_that_failed(lines: list[str], hint: str) -> None:
    assert hint in str(image_build._build_error("podman", lines).hint)


def test_a_directory_without_a_dockerfile(place: Place) -> None:
    (place.directory / "Dockerfile").unlink()
    with pytest.raises(SpecError, match=r"cannot read .*Dockerfile"):
        place.build()


def test_a_cache_that_cannot_be_written(place: Place) -> None:
    place.cache.touch()
    with pytest.raises(ContainerError, match="cannot prepare the build"):
        place.build()


def test_what_docker_says_is_passed_on_until_it_says_error() -> None:
    heard: list[str] = []
    good = [{"stream": "Step 1/2 : FROM x\n"}, {"stream": "\n"}, {"aux": {"ID": "sha256:1"}}]
    assert image_build._succeeded(good, heard.append, float("inf"))
    assert heard == ["Step 1/2 : FROM x"]
    assert not image_build._succeeded([{"error": "returned 1", "errorDetail": {}}, *good], heard.append, float("inf"))
    assert heard[-1] == "returned 1"
    with pytest.raises(ContainerError, match="has not ended within"):
        image_build._succeeded(good, heard.append, 0)


# --- running a tool


def test_lines_of_both_streams_come_while_it_runs() -> None:
    heard: list[str] = []
    assert (
        run_told(["sh", "-c", "echo a; echo b >&2; printf c; exit 3"], environ={}, tell=heard.append, timeout_s=30) == 3
    )
    assert heard == ["a", "b", "c"]


def test_a_tool_that_does_not_end_is_ended_though_another_holds_its_output() -> None:
    heard: list[str] = []
    argv = ["sh", "-c", "echo begun; sleep 5 & wait"]
    with pytest.raises(ContainerError, match=r"sh -c has not ended within 0\.5 s"):
        run_told(argv, environ={"PATH": os.defpath}, tell=heard.append, timeout_s=0.5)
    assert heard == ["begun"]
