"""From what a file system did to findings: can runs live on it, is there room, is it seen from every node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.operations.checkup.findings import Family, Finding, Level
from orchestrator.operations.checkup.target import CACHES, Target
from orchestrator.paths import RootPaths
from orchestrator.words import count, size
from orchestrator.worker.probe.disk import DiskFacts

LITTLE_BYTES = 10 * 10**9
FEW_INODES = 10_000
SLOW_FSYNC_MS = 1000.0
SKEW_S = 5.0
SMALL_CACHE_BYTES = 20 * 10**9
_QUOTA_NEARLY = 0.9
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_OF_ONE_MACHINE = (*_IN_MEMORY, "overlay", "squashfs")
_LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "reiserfs", "vfat", "exfat")
_PRIVATE_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")


@dataclass(frozen=True)
class Sight:
    """Who sees this machine's directories: the cluster's hosts, and the one that was seen to (`--node`)."""

    here: str
    hosts: frozenset[str] = frozenset()
    met: str | None = None


def disk_findings(topic: str, facts: DiskFacts, *, where: str = "") -> Iterator[Finding]:
    """Is it writable, does it keep its promises, is there room. `where`: the node, if it is not this machine."""
    path = f"{where}{facts.path}"
    if facts.error:
        fix = "choose another place (root: in the spec, --root, checkpoint.uri), or make room and give yourself access"
        yield Finding(topic, Level.BAD, f"{path} cannot be written: {facts.error}", fix, Family.DISK)
        return
    yield _promises(topic, path, facts)
    yield _room(topic, path, facts)
    if facts.clock_skew_s is not None and abs(facts.clock_skew_s) > SKEW_S:
        message = f"{path}: the file server's clock is {facts.clock_skew_s:+.0f} s off ours, and so are ages"
        yield Finding(topic, Level.WARN, message, "the administrator: time synchronisation (chrony, ntp)", Family.DISK)


def _promises(topic: str, path: str, facts: DiskFacts) -> Finding:
    broken = [
        what
        for what, kept in (
            ("renaming over a file is not atomic", facts.atomic_replace),
            ("two can create the same file (O_EXCL)", facts.exclusive_create),
            ("it has no hard links", facts.hard_link),
        )
        if not kept
    ]
    if broken:
        message = f"{path} ({facts.file_system}): {'; '.join(broken)}"
        return Finding(
            topic, Level.BAD, message, "put the root on a POSIX file system (NFS, Lustre, GPFS …)", Family.DISK
        )
    sync_ms = max(facts.fsync_ms or 0.0, facts.dirsync_ms or 0.0)
    message = (
        f"{path}: writable, rename is atomic, O_EXCL and hard links work, fsync {_ms(facts.fsync_ms)} "
        f"(directory {_ms(facts.dirsync_ms)}), {facts.file_system}"
    )
    if sync_ms > SLOW_FSYNC_MS:
        return Finding(topic, Level.WARN, f"{message}: slow; it is part of every save", "try another disk", Family.DISK)
    return Finding(topic, Level.OK, message, None, Family.DISK)


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def _room(topic: str, path: str, facts: DiskFacts) -> Finding:
    inodes = "" if facts.free_inodes is None else f" and {count(facts.free_inodes)} inodes"
    message = f"{path}: {size(facts.free_bytes)}{inodes} free"
    short = facts.free_bytes < LITTLE_BYTES or (facts.free_inodes is not None and facts.free_inodes < FEW_INODES)
    if short:
        fix = "make room, or set checkpoint.keep_last lower; a save that finds no room leaves the previous checkpoint"
        return Finding(topic, Level.WARN, message, fix, Family.DISK)
    return Finding(topic, Level.OK, message, None, Family.DISK)


def place_finding(topic: str, facts: DiskFacts, target: Target, sight: Sight) -> Finding | None:
    """Is it the same directory on every node, which a requeued run needs? None where it plainly is."""
    if target.backend == "local" or facts.error:
        return None
    kind = f"{facts.path} is on {facts.file_system} of this machine"
    one_machine = facts.file_system in _OF_ONE_MACHINE
    private = facts.file_system in _LOCAL_DISKS and facts.mount_point != "/" and facts.mount_point in _PRIVATE_PLACES
    private = private or (facts.file_system in _LOCAL_DISKS and Path(facts.tried).is_relative_to("/tmp"))
    if not one_machine and facts.file_system not in _LOCAL_DISKS:
        return None
    if sight.met is not None and sight.met != sight.here:
        return Finding(topic, Level.OK, f"{facts.path} is the same directory on {sight.met}", None, Family.DISK)
    if sight.hosts == {sight.here}:
        if facts.file_system in _IN_MEMORY:
            message = f"{kind}, which is memory: a restart of the machine takes all runs with it"
            return Finding(topic, Level.WARN, message, "put the root on a disk", Family.DISK)
        message = f"{kind}, and every node of the partition is this machine"
        return Finding(topic, Level.OK, message, None, Family.DISK)
    fix = "put it on the shared disk: root: in the spec or the site profile, --root, checkpoint.uri"
    if one_machine or private:
        message = f"{kind}: other nodes do not see it, and a requeued run would not find its checkpoints"
        return Finding(topic, Level.BAD, message, fix, Family.DISK)
    message = f"{kind}, which looks like a disk of its own; other nodes must see the same directory"
    return Finding(topic, Level.WARN, message, "`orch doctor --node` tries it from a compute node", Family.DISK)


# --- quota ----------------------------------------------------------------------------------------------------------
def quota_findings(text: str, facts: Mapping[str, DiskFacts]) -> Iterator[Finding]:
    """From `quota -w -p` (quota(1)): blocks of 1 KiB and files, each with soft and hard limit; 0 = none."""
    for line in text.splitlines():
        fields = [word.rstrip("*") for word in line.split()]
        if len(fields) < 9 or not all(word.isdigit() for word in fields[1:4] + fields[5:8]):
            continue
        topic = next((topic for topic, disk in facts.items() if disk.device == fields[0]), None)
        if topic is None:
            continue
        for what, used, soft, hard in (("space", *fields[1:4]), ("files", *fields[5:8])):
            limit = int(hard) or int(soft)
            if limit and int(used) >= _QUOTA_NEARLY * limit:
                share = f"{100 * int(used) / limit:.0f} %"
                message = f"your quota of {what} on {fields[0]} is used to {share}"
                full = Level.BAD if int(hard) and int(used) >= int(hard) else Level.WARN
                yield Finding(topic, full, message, "delete old runs, or ask for more", Family.DISK)


# --- caches ---------------------------------------------------------------------------------------------------------
def cache_places(target: Target) -> dict[str, str]:
    """Where libraries will put their downloads, by variable."""
    base = target.caches.get("XDG_CACHE_HOME") or str(RootPaths(target.root).caches)
    beneath = {"XDG_CACHE_HOME": base, "HF_HOME": f"{base}/huggingface", "TORCH_HOME": f"{base}/torch"}
    return {name: target.caches.get(name, beneath[name]) for name in CACHES}


def cache_finding(target: Target, spaces: Mapping[str, tuple[int, str]]) -> Finding:
    """Downloads need room that a home directory may not have. `spaces`: free bytes and mount point, by path."""
    places = cache_places(target)
    small = [place for place in dict.fromkeys(places.values()) if spaces[place][0] < SMALL_CACHE_BYTES]
    if small:
        names = ", ".join(name for name, place in places.items() if place in small)
        home = ", in your home directory" if Path(small[0]).is_relative_to(target.home) else ""
        message = f"downloads ({names}) go to {small[0]}{home}, where {size(spaces[small[0]][0])} are free"
        return Finding("caches", Level.WARN, message, _CACHES_FIX, Family.DISK)
    tightest = min(places.values(), key=lambda place: spaces[place][0])
    message = f"downloads go to {', '.join(dict.fromkeys(places.values()))} ({size(spaces[tightest][0])} free)"
    return Finding("caches", Level.OK, message, None, Family.DISK)


_CACHES_FIX = "the site profile's key `caches` names a directory with room (docs/site-profile.md)"
