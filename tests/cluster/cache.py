"""What is costly to make for the test cluster, kept between runs: each piece under the hash of its inputs.

A piece is published by one rename, so an interrupted build is never mistaken for a finished one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.service import ClusterError, remove_tree

_TIMEOUT_S = 1800


def cache_directory() -> Path:
    """$ORCH_TEST_CACHE, or orch-tests in the user's cache directory."""
    if named := os.environ.get("ORCH_TEST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orch-tests"


def key(*inputs: str) -> str:
    """Name of a piece: the hash of everything that decides its content."""
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One builder at a time on this machine; the others wait and then find the image."""
    with (cache / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish_file(partial: Path, target: Path) -> None:
    """Give a finished file its name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def sweep(cache: Path, kinds: Iterable[str], current: Collection[str]) -> None:
    """Remove what an interrupted build left behind and what other inputs made; under the lock: nobody writes it now."""
    old = [path for kind in kinds for path in cache.glob(f"{kind}-*") if path.name.removesuffix(".tar") not in current]
    for path in [*cache.glob("tmp-*"), *old]:
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()


def run_long(argv: list[str], *, env: Mapping[str, str]) -> None:
    """Run a command whose output people may want to watch; it goes to standard error."""
    try:
        code = subprocess.run(
            argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=_TIMEOUT_S, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{argv[0]}: {error}") from error
    if code != 0:
        raise ClusterError(f"{' '.join(argv)} ended with {code} (its output is above)")


def say(text: str) -> None:
    """A line for whoever waits."""
    print(f"[test cluster] {text}", file=sys.stderr, flush=True)


def debootstrap(root: Path, suite: str | None, packages: str) -> None:
    """A minimal Debian with `packages`, from the mirror that this machine's apt uses; its own release unless told."""
    own, mirror, keyring = debian_source()
    options = [f"--keyring={keyring}"] if keyring else []
    root.chmod(0o755)  # packages become users of their own while they are set up
    run_long(
        ["debootstrap", "--variant=minbase", f"--include={packages}", *options, suite or own, str(root), mirror],
        env=os.environ,
    )


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
