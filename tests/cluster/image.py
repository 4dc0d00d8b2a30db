"""The pinned image for the tests, without a hub: debootstrap → docker import → docker build without network → save.

What is costly to make (base system, wheels, image) is kept below the cache directory, each under the hash of its inputs
and published by one rename, so an interrupted build is never mistaken for a finished one.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.service import ClusterError, call, remove_tree

CONTEXT = Path(__file__).resolve().parents[2] / "containers" / "pretrain-cpu"
_PACKAGES = "python3,python3-venv"
_RECIPE = "1"  # counts up when the way the image is built changes without a change of its files
_PIECES = {"base": "base", "wheels": "wheels", "image": "image", "engine": "image"}  # what the cache holds → its key
_TIMEOUT_S = 1800
# Nothing in a container reads these, and they are a third of the base system.
_LEAVE_OUT = (
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
)


def cache_directory() -> Path:
    """$ORCH_TEST_CACHE, or orch-tests in the user's cache directory."""
    if named := os.environ.get("ORCH_TEST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orch-tests"


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
    with _locked(template.parent):
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
    return cache_directory() / f"engine-{_key('image')}"


def ensure_image(env: Mapping[str, str]) -> str:
    """Load the image into the engine of `env`, built first where the cache has none; returns its id `sha256:…`."""
    if tag() in call(["docker", "images", "--format={{.Repository}}:{{.Tag}}"], env=env, timeout=30).stdout.split():
        return _image_id(env)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"image-{_key('image')}.tar"
    with _locked(cache):
        if not archive.exists():
            _sweep(cache)
            _build(cache, archive, env)
            return _image_id(env)
    _say(f"load {archive.name}")
    call(["docker", "load", "--quiet", "--input", str(archive)], env=env, timeout=300)
    return _image_id(env)


def tag() -> str:
    """The image's name in the test engine; tests use the id, people the name."""
    return f"orch-test/pretrain-cpu:{_key('image')}"


def _image_id(env: Mapping[str, str]) -> str:
    return call(["docker", "image", "inspect", "--format={{.Id}}", tag()], env=env, timeout=30).stdout.strip()


def _key(what: str) -> str:
    """Hash of everything that decides the content of a cached piece: base, wheels or image."""
    suite, mirror, _ = debian_source()
    parts = {"base": [_RECIPE, suite, mirror, _PACKAGES, *_LEAVE_OUT], "wheels": [_RECIPE, _lock()]}
    parts["image"] = [*parts["base"], *parts["wheels"], (CONTEXT / "Dockerfile").read_text()]
    return hashlib.sha256("\0".join(parts[what]).encode()).hexdigest()[:16]


def _lock() -> str:
    return (CONTEXT / "requirements.lock").read_text()


def debian_source() -> tuple[str, str, str | None]:
    """Suite, mirror and keyring that this machine's apt is set up with (both formats of sources.list(5))."""
    suite = ""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            suite = value.strip('"')
    for mirror, suites, components, keyring in _apt_sources():
        if suite in suites and "main" in components and mirror.startswith(("http:", "https:", "file:")):
            return suite, mirror, keyring
    raise ClusterError(f"apt has no source of {suite or 'this release'} main: cannot build the base image")


def _apt_sources() -> Iterator[tuple[str, list[str], list[str], str | None]]:
    root = Path("/etc/apt")
    for file in sorted((root / "sources.list.d").glob("*.sources")):
        for stanza in file.read_text().split("\n\n"):
            fields = dict(_deb822(stanza))
            if fields.get("types", "").split()[:1] == ["deb"] and fields.get("enabled", "yes") != "no":
                keyring = fields.get("signed-by", "")
                for mirror in fields.get("uris", "").split():
                    yield (
                        mirror,
                        fields.get("suites", "").split(),
                        fields.get("components", "").split(),
                        (keyring if keyring.startswith("/") else None),
                    )
    for listing in [root / "sources.list", *sorted((root / "sources.list.d").glob("*.list"))]:
        for line in listing.read_text().splitlines() if listing.exists() else []:
            words = line.partition("#")[0].replace("[", " [ ").replace("]", " ] ").split()
            if words[:1] != ["deb"]:
                continue
            options = words[words.index("[") + 1 : words.index("]")] if "[" in words else []
            rest = words[words.index("]") + 1 :] if "]" in words else words[1:]
            signed_by = next((o.partition("=")[2] for o in options if o.startswith("signed-by=/")), None)
            if len(rest) >= 3:
                yield rest[0], [rest[1]], rest[2:], signed_by


def _deb822(stanza: str) -> Iterator[tuple[str, str]]:
    for line in stanza.splitlines():
        key, colon, value = line.partition(":")
        if colon and not line.startswith(("#", " ", "\t")):
            yield key.strip().lower(), value.strip()


def _build(cache: Path, archive: Path, env: Mapping[str, str]) -> None:
    started = time.monotonic()
    base, wheels = _ensure_base(cache), _ensure_wheels(cache)
    _say("import the base system and build the image (about a minute)")
    base_tag = f"orch-test/base:{_key('base')}"
    _long(["docker", "import", str(base), base_tag], env=env)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache) as context:
        for name in ("Dockerfile", "requirements.lock"):
            shutil.copy(CONTEXT / name, context)
        shutil.copytree(wheels, Path(context) / "wheels", copy_function=os.link)
        _long(
            ["docker", "build", "--network=none", f"--build-arg=BASE={base_tag}", f"--tag={tag()}", context],
            # The classic builder: a newer client asks for a plugin (buildx) before it uses BuildKit.
            env={**env, "DOCKER_BUILDKIT": "0"},
        )
    partial = cache / f"tmp-{archive.name}"
    _long(["docker", "save", "--output", str(partial), tag()], env=env)
    _publish(partial, archive)
    _say(f"image of {archive.stat().st_size / 1e9:.2f} GB made in {time.monotonic() - started:.0f} s")


def _ensure_base(cache: Path) -> Path:
    """Tar file of a minimal Debian with the system's Python."""
    target = cache / f"base-{_key('base')}.tar"
    if target.exists():
        return target
    suite, mirror, keyring = debian_source()
    _say(f"make the base system: {suite} (about a minute)")
    root = Path(tempfile.mkdtemp(prefix="tmp-root-", dir=cache))
    options = [f"--keyring={keyring}"] if keyring else []
    _long(
        ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", *options, suite, str(root), mirror],
        env=os.environ,
    )
    partial = cache / f"tmp-{target.name}"
    # --one-file-system: debootstrap mounts proc and sys inside the new root while it works.
    leave_out = [f"--exclude={pattern}" for pattern in _LEAVE_OUT]
    _long(
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
    _publish(partial, target)
    return target


def _ensure_wheels(cache: Path) -> Path:
    """Directory with the wheels that the lock file names and, for a CUDA build of torch, the ones that it pulls in."""
    target = cache / f"wheels-{_key('wheels')}"
    if target.exists():
        return target
    _say("download the wheels of the image")
    partial = Path(tempfile.mkdtemp(prefix="tmp-wheels-", dir=cache))
    # `torch==X` also matches `X+cpu`, and pip prefers that one wherever it is offered.
    _long(
        [sys.executable, "-m", "pip", "download", "--only-binary=:all:", f"--dest={partial}",
         f"--requirement={CONTEXT / 'requirements.lock'}"],
        env=os.environ,
    )  # fmt: skip
    partial.rename(target)
    return target


def _publish(partial: Path, target: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def _sweep(cache: Path) -> None:
    """Remove what an interrupted build left behind and what other inputs made; under the lock: nobody writes it now."""
    current = {f"{kind}-{_key(key)}" for kind, key in _PIECES.items()}
    old = [
        path for kind in _PIECES for path in cache.glob(f"{kind}-*") if path.name.removesuffix(".tar") not in current
    ]
    for path in [*cache.glob("tmp-*"), *old]:
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()


def _long(argv: list[str], *, env: Mapping[str, str]) -> None:
    """Run a command whose output people may want to watch; it goes to standard error."""
    try:
        code = subprocess.run(
            argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=_TIMEOUT_S, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{argv[0]}: {error}") from error
    if code != 0:
        raise ClusterError(f"{' '.join(argv)} ended with {code} (its output is above)")


def _say(text: str) -> None:
    print(f"[test image] {text}", file=sys.stderr, flush=True)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One builder at a time on this machine; the others wait and then find the image."""
    with (cache / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """`python -m tests.cluster.image`: load the image into the engine that DOCKER_HOST names and print its id."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    print(ensure_image(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
