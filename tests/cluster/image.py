"""The pinned image for the tests, without a hub: debootstrap → docker import → `orch image build` → save.

What is costly to make (base system, wheels, image, an interpreter with the same packages) is kept in the cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import OrchError
from orchestrator.operations.image_build import build_image, ensure_wheels, read_hashed_lock, wheels_name
from tests.cluster.cache import (
    cache_directory,
    debian_source,
    debootstrap,
    key,
    locked,
    publish_file,
    run_long,
    say,
    sweep,
)
from tests.cluster.service import ClusterError, call, remove_tree

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXT = REPOSITORY / "containers" / "pretrain"
LOCK = CONTEXT / "requirements-cpu.lock"
BASE_LOCK = REPOSITORY / "containers" / "base" / "requirements.lock"
_PACKAGES = "python3,python3-venv"
_RECIPE = "1"  # counts up when the way the image is built changes without a change of its files
_PIECES = {
    "base": "base",
    "image": "image",
    "engine": "image",
    "podman": "image",
    "python": "python",
}  # what the cache holds → its key
# Nothing in a container reads these, and they are a third of the base system.
_LEAVE_OUT = (
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
)


def prefill(data_root: Path) -> None:
    """Give an engine that has not started yet the image, by hard links: a second instead of the twenty of a load.

    Layers are never written to in place, so engines may share their files. Without a template, or with the cache on
    another file system, nothing happens and `ensure_image` loads the archive.
    """
    template = _template()
    if template.exists() and template.stat().st_dev == data_root.parent.stat().st_dev:
        call(["cp", "--archive", "--link", str(template), str(data_root)], env=os.environ, timeout=120)


def keep_template(data_root: Path) -> None:
    """Keep what an engine made of the image, for `prefill`; only while that engine is down (it mounts its layers)."""
    template = _template()
    parts = [data_root / name for name in ("image", "overlay2")]
    same_device = data_root.stat().st_dev == template.parent.stat().st_dev
    with locked(template.parent):
        if template.exists() or not same_device or not all(part.is_dir() for part in parts):
            return
        partial = Path(tempfile.mkdtemp(prefix="tmp-template-", dir=template.parent))
        partial.chmod(0o710)
        call(["cp", "--archive", "--link", *map(str, parts), str(partial)], env=os.environ, timeout=120)
        partial.rename(template)


def has_template() -> bool:
    """True when the next engine can be prefilled."""
    return _template().exists()


def _template() -> Path:
    return cache_directory() / f"engine-{image_key()}"


def ensure_image(env: Mapping[str, str]) -> str:
    """Load the image into the engine of `env`, built first where the cache has none; returns its id `sha256:…`."""
    if tag() in call(["docker", "images", "--format={{.Repository}}:{{.Tag}}"], env=env, timeout=60).stdout.split():
        return _image_id(env)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        if not archive().exists():
            sweep(cache, [*_PIECES, "wheels"], _current())
            _build(cache, archive(), env)
            return _image_id(env)
    say(f"load {archive().name}")
    call(["docker", "load", "--quiet", "--input", str(archive())], env=env, timeout=300)
    return _image_id(env)


def base_system() -> Path:
    """Tar file of the Debian below the image: python3 and nothing of ours."""
    with locked(cache_directory()):
        return _ensure_base(cache_directory())


def archive() -> Path:
    """The image as `docker save` writes it."""
    return cache_directory() / f"image-{image_key()}.tar"


def image_key() -> str:
    """Names everything that is made of the image."""
    return _key("image")


def tag() -> str:
    """The image's name in the test engine; tests use the id, people the name."""
    return f"orch-test/pretrain:{image_key()}"


def _image_id(env: Mapping[str, str]) -> str:
    return call(["docker", "image", "inspect", "--format={{.Id}}", tag()], env=env, timeout=60).stdout.strip()


def _current() -> set[str]:
    """Names of the pieces of this checkout."""
    wheels = {wheels_name(read_hashed_lock(lock).sha256) for lock in (LOCK, BASE_LOCK)}
    return wheels | {f"{kind}-{_key(input)}" for kind, input in _PIECES.items()}


def _key(what: str) -> str:
    """Hash of everything that decides the content of a cached piece: base, image or python."""
    suite, mirror, _ = debian_source()
    parts = {"base": [_RECIPE, suite, mirror, _PACKAGES, *_LEAVE_OUT]}
    parts["image"] = [*parts["base"], LOCK.read_text(), (CONTEXT / "Dockerfile").read_text()]
    parts["python"] = [_RECIPE, LOCK.read_text(), sys.version, str(Path(sys.executable).resolve())]
    return key(*parts[what])


def _build(cache: Path, target: Path, env: Mapping[str, str]) -> None:
    started = time.monotonic()
    base = _ensure_base(cache)
    say("import the base system and build the image (about a minute)")
    base_tag = f"orch-test/base:{_key('base')}"
    run_long(["docker", "import", str(base), base_tag], env=env)
    try:
        ensure_wheels(read_hashed_lock(LOCK), cache, tell=_tell)  # with this process's settings of pip
        build_image(
            CONTEXT, base=base_tag, tag=tag(), lock=LOCK, builder="docker", environ=env, cache=cache, tell=_tell
        )
    except OrchError as error:
        raise ClusterError(str(error)) from error
    partial = cache / f"tmp-{target.name}"
    run_long(["docker", "save", "--output", str(partial), tag()], env=env)
    publish_file(partial, target)
    say(f"image of {target.stat().st_size / 1e9:.2f} GB made in {time.monotonic() - started:.0f} s")


def _ensure_base(cache: Path) -> Path:
    """Tar file of a minimal Debian with the system's Python."""
    target = cache / f"base-{_key('base')}.tar"
    if target.exists():
        return target
    say("make the base system (about a minute)")
    root = Path(tempfile.mkdtemp(prefix="tmp-root-", dir=cache))
    debootstrap(root, None, _PACKAGES)
    partial = cache / f"tmp-{target.name}"
    # --one-file-system: debootstrap mounts proc and sys inside the new root while it works.
    leave_out = [f"--exclude={pattern}" for pattern in _LEAVE_OUT]
    run_long(
        [
            "tar",
            "--create",
            "--one-file-system",
            "--numeric-owner",
            *leave_out,
            f"--file={partial}",
            f"--directory={root}",
            ".",
        ],
        env=os.environ,
    )
    remove_tree(root)
    publish_file(partial, target)
    return target


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lock_python() -> Path:
    """An interpreter with the image's packages and this checkout: runs without a container compare with those in it."""
    if sys.version_info[:2] != (3, 11):
        raise ClusterError("the wheels of the image are for Python 3.11")
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        return _ensure_interpreter(_ensure_packages(cache))


def _ensure_packages(cache: Path) -> Path:
    """Virtual environment with exactly what the lock pins."""
    target = cache / f"python-{_key('python')}"
    if target.exists():
        return target
    say("install the packages of the image for runs without one (about a minute)")
    wheels = ensure_wheels(read_hashed_lock(LOCK), cache, tell=_tell)
    partial = Path(tempfile.mkdtemp(prefix="tmp-python-", dir=cache))
    call([sys.executable, "-m", "venv", "--without-pip", str(partial)], env=os.environ, timeout=60)
    run_long(
        [
            *(sys.executable, "-m", "pip", f"--python={partial}/bin/python", "install", "--quiet", "--no-index"),
            *("--require-hashes", f"--find-links={wheels}", f"--requirement={LOCK}"),
        ],
        env=os.environ,
    )
    partial.rename(target)
    return target


def _ensure_interpreter(packages: Path) -> Path:
    """One for each checkout, or two that share the cache would run each other's code."""
    target = packages / "checkouts" / key(str(REPOSITORY))
    interpreter = target / "bin" / "python"
    if interpreter.exists():
        return interpreter
    target.parent.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    call([sys.executable, "-m", "venv", "--without-pip", str(partial)], env=os.environ, timeout=60)
    site = Path("lib", "python3.11", "site-packages")
    (partial / site / "checkout.pth").write_text(f"{packages / site}\n{REPOSITORY}\n")
    partial.rename(target)
    return interpreter


def main() -> int:
    """`python -m tests.cluster.image`: load the image into the engine that DOCKER_HOST names and print its id."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    print(ensure_image(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
