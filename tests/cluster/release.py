"""Another release of Slurm than the machine's, beside it: Debian's packages with their own loader and libraries.

No chroot, no mounts: jobs see the machine as it is, and only what Slurm does is another release's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tests.cluster.cache import cache_directory, debian_source, debootstrap, key, locked, say, sweep
from tests.cluster.service import ClusterError, call, remove_tree

SUITES = {"24.11": "trixie"}
"""Release of Slurm → the release of Debian that packages it."""
_PACKAGES = ("slurm-client", "slurmctld", "slurmd", "slurmdbd", "patchelf")
_RECIPE = "1"  # counts up when the way a tree is made changes


def install(release: str, directory: Path) -> None:
    """Put `bin` and `lib` of that release into `directory`; built first where the cache has none (about a minute)."""
    if release not in SUITES:
        raise ClusterError(f"no Slurm {release} for the test cluster; there is {', '.join(SUITES)}")
    # A copy: the cache is root's alone, but jobs of every user need their srun.
    call(["cp", "--archive", "--reflink=auto", str(_ensure(release)), str(directory)], env=os.environ, timeout=120)
    directory.chmod(0o755)
    library = directory / "lib"
    loader = next(library.glob("ld-linux*.so.*"))
    patchelf = [str(loader), "--library-path", str(library), str(directory / "patchelf")]
    programs = [str(program) for program in (directory / "bin").iterdir()]
    # The loader's path is part of a program, and the machine's loader and libraries are too old for these.
    # RPATH, not RUNPATH, which would not hold for what plugins need.
    rpath = f"{library}/slurm-wlm:{library}"
    call(
        [*patchelf, "--set-interpreter", str(loader), "--force-rpath", "--set-rpath", rpath, *programs],
        env=os.environ,
        timeout=60,
    )


def plugins(directory: Path) -> Path:
    """PluginDir of what `install` has put into `directory`."""
    return directory / "lib" / "slurm-wlm"


def _ensure(release: str) -> Path:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    suite = SUITES[release]
    target = cache / f"slurm{release}-{key(_RECIPE, suite, debian_source()[1], *_PACKAGES)}"
    with locked(cache):
        if not target.exists():
            sweep(cache, [f"slurm{release}"], {target.name})
            _build(suite, cache, target)
    return target


def _build(suite: str, cache: Path, target: Path) -> None:
    say(f"fetch the Slurm of {suite} (about a minute)")
    root = Path(tempfile.mkdtemp(prefix="tmp-root-", dir=cache))
    debootstrap(root, suite, ",".join(_PACKAGES))
    partial = Path(tempfile.mkdtemp(prefix="tmp-slurm-", dir=cache))
    (partial / "bin").mkdir()
    for program in _programs(root):
        shutil.copy2(program, partial / "bin" / program.name.removesuffix("-wlm"))
    shutil.copy2(root / "usr/bin/patchelf", partial)
    (library,) = (path.parent for path in root.glob("usr/lib/*/slurm-wlm"))
    shutil.copytree(library, partial / "lib", symlinks=True)
    remove_tree(root)
    os.sync()
    partial.rename(target)


def _programs(root: Path) -> list[Path]:
    """What the packages of Slurm have put into bin and sbin."""
    lists = [root / f"var/lib/dpkg/info/{package}.list" for package in _PACKAGES if package.startswith("slurm")]
    names = [line for file in lists for line in file.read_text().splitlines()]
    return [root / name.lstrip("/") for name in names if name.startswith(("/usr/bin/", "/usr/sbin/"))]
