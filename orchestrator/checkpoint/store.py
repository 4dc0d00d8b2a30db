"""The commit protocol of every checkpoint store (PROTOCOLS 4), over a medium that keeps the bytes.

A save is data → manifest → is my epoch still the highest? → pointer, each durable before the next. The manifest is the
commit: a crash before it leaves files nobody reads, a crash after it leaves a complete checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Unpack

from orchestrator.checkpoint.coverage import parse_index
from orchestrator.checkpoint.found import Found, Listed, Load, Skipped
from orchestrator.checkpoint.lineage import (
    FROM_SCRATCH,
    Fence,
    Lineage,
    fence_name,
    parse_fence,
    parse_fence_name,
)
from orchestrator.checkpoint.manifest import (
    CORRUPT_SUFFIX,
    DATA_SUFFIX,
    INDEX_PART,
    MANIFEST_SUFFIX,
    POINTER,
    CheckpointName,
    FileEntry,
    Manifest,
    Origin,
    check_files,
    finite,
    parse_manifest,
)
from orchestrator.checkpoint.medium import Medium, Reading, Trace, Vanished
from orchestrator.checkpoint.retention import Best, Retention, best, kept
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced
from orchestrator.files import open_atomic, write_atomic

_log = logging.getLogger(__name__)


REMEMBERED_BASES = 16  # of the epochs before it in every fence; all of them would grow with the square of the attempts
_commits = itertools.count()  # of this process: one that saves here and in the refuge must not start again at 0
RETRY_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8)


class CheckpointStore:
    """Commits and finds checkpoints of one run. Blocking; rank 0 of an attempt writes, the others only `write_part`.

    Instances share nothing but the medium.
    """

    def __init__(
        self,
        medium: Medium,
        *,
        shared_disk: Medium | None = None,
        claim_on_disk: bool = False,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        node: str | None = None,
    ) -> None:
        self.medium = medium
        self.uri = medium.uri
        # Fences may lie in two places, because `checkpoint.fence` may change between attempts: all of them count.
        self._fences = (medium,) if shared_disk is None else (shared_disk, medium)
        self._claims = self._fences[0] if claim_on_disk else medium
        self._clock = clock
        self._sleep = sleep
        self._node = node or os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        # What the last `find` passed over: a claim may bury it. `_unreadable`: content unknown because of I/O errors.
        self._passed_over: set[CheckpointName] = set()
        self._unreadable: set[CheckpointName] = set()
        self._bad_sectors: set[CheckpointName] = set()  # of these, the ones that no waiting will help
        self._read_back: set[CheckpointName] = set()  # their bytes have matched
        self._told_of_metric = False

    def weaknesses(self) -> tuple[str, ...]:
        """Tries the place out: one sentence for every guarantee that it does not give.

        Raises CheckpointError when checkpoints cannot be kept there at all.
        """
        return ()

    # --- reading

    def find(self, *, keep: bool = True, load: Load | None = None) -> Found | None:
        """The newest live checkpoint whose bytes match; None when nothing was ever committed.

        Without `keep` its bytes are compared and not kept: there is nothing to load where `files` says.
        `load` is called with the path of a checkpoint in one file, on a disk while its bytes are still being compared:
        what it makes of damaged ones is dropped, and so is what it raises. It must not trust what it reads.
        Damaged ones are set aside as `*.corrupt` and reported. Raises CheckpointCorrupt when checkpoints were committed
        but none is usable (to start over silently would throw the work away for good), CheckpointError when the store
        cannot be read.
        """
        for delay in (*RETRY_DELAYS_S, None):
            try:
                with self._translated("read"):
                    return self._find(keep, load)
            except Vanished as vanished:
                if delay is None:
                    raise CheckpointError(
                        f"the checkpoints in {self.uri} change faster than they can be read ({vanished})",
                        hint="another attempt of this run is still saving; stop it or try again",
                    ) from vanished
                self._sleep(delay)
        raise AssertionError("unreachable")

    def fetch(self, manifest_name: str, *, only: Container[str] | None = None) -> Found:
        """That checkpoint (or these files of it), verified, whoever owns the run; changes nothing.

        Raises CheckpointError.
        """
        name = CheckpointName.parse(manifest_name, MANIFEST_SUFFIX)
        if name is None:
            raise CheckpointError(f"{manifest_name!r} is no manifest of a checkpoint")
        try:
            with self._translated("read"):
                manifest = self._load(name)
                problem = self._verify(manifest, keep=True, only=only)
        except Vanished as vanished:
            raise CheckpointError(f"{self._locate(manifest_name)} was removed meanwhile ({vanished})") from None
        if problem is not None:
            raise CheckpointError(f"{self._locate(name.data)} cannot be used on this node: {problem}")
        return self._found(manifest, (), only)

    def manifests(self) -> list[Manifest]:
        """Live checkpoints, newest first. Their bytes are not verified and nothing is changed."""
        with self._translated("list"):
            names = self._names()
            return self._load_live(names, self._lineage(names))

    def _names(self) -> list[str]:
        """What lies in the medium, and the fences of both places."""
        names = self.medium.names()  # first: whatever is published later, a fence seen afterwards may bury
        afterwards = [place for place in self._fences if place is not self.medium or not place.lists_at_once]
        return [*names, *_fence_names(afterwards).difference(names)]

    def inventory(self, *, waiting: Medium | None = None) -> list[Listed]:
        """Every committed checkpoint, newest first, live or not. No data is read and nothing is changed."""
        with self._translated("list"):
            names = self._names()
            lineage = self._lineage(names)
            places = {self.medium: _manifest_names(names)}
            if waiting is not None:
                places[waiting] = [n for n in _manifest_names(waiting.names()) if n not in places[self.medium]]
            found = []
            for medium, listed in places.items():
                sizes = medium.sizes()  # after the names: data is older than its manifest
                for name in listed:
                    with suppress(Vanished):
                        found.append(self._listed(name, lineage, sizes, medium))
        return sorted(found, key=lambda listed: listed.manifest.rank if listed.manifest else _rank(listed.name))[::-1]

    def _listed(self, name: CheckpointName, lineage: Lineage, sizes: Mapping[str, int], medium: Medium) -> Listed:
        live = lineage.is_live(name.fence_epoch, name.step)
        problem = None if live else lineage.explain(name.fence_epoch, name.step)
        try:
            manifest = self._load(name, medium)
        except CheckpointCorrupt as error:
            return Listed(name, f"{medium.uri}/{name.data}", None, live, problem or error.message)
        for entry in manifest.files:
            if problem is None and sizes.get(entry.name) != entry.size:
                if name.manifest not in sizes:
                    raise Vanished(name.manifest)  # by its owner's garbage collection, since the names were read
                there = f"has {sizes[entry.name]} bytes" if entry.name in sizes else "is missing"
                problem = f"{entry.name} {there}, its manifest says {entry.size} bytes"
        return Listed(name, manifest.location, manifest, live, problem)

    def owner(self) -> Fence | None:
        """The newest fence that counts: the attempt that owns the run. None before the first."""
        with self._translated("check who owns the run"):
            lineage = self._lineage(self._names())
        counting = [fence for epoch, fence in lineage.fences.items() if not lineage.is_void(epoch)]
        return max(counting, key=lambda fence: fence.epoch, default=None)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file there is, by name."""
        with self._translated("list"):
            return self.medium.sizes()

    def copy_to(self, directory: Path, manifest: Manifest, *, reading: Reading | None = None) -> Path:
        """Copy a checkpoint into a local directory (made if missing), compared on its way; the path to load.

        Each file appears whole and durable, the manifest last. Raises CheckpointCorrupt when the bytes do not match,
        CheckpointError when they cannot be read or written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for entry in manifest.files:
                with open_atomic(directory / entry.name) as copy:
                    problem = self.medium.fetch(entry, copy, reading=reading)
                    if problem is not None:
                        raise CheckpointCorrupt(
                            f"the checkpoint of step {manifest.step} is damaged: {problem}",
                            hint="nothing was copied in its place; `orch ckpt verify` says which ones match",
                        )
            write_atomic(directory / manifest.name.manifest, self.medium.read(manifest.name.manifest))
        except OSError as error:
            raise CheckpointError(
                f"could not copy {manifest.location} to {directory}: {describe(error)}",
                hint="check the room and the permissions there, and that the checkpoint still exists (`orch ckpt ls`)",
            ) from error
        return directory / manifest.files[0].name

    def _find(self, keep: bool, load: Load | None) -> Found | None:
        names = self._names()
        lineage = self._lineage(names)
        self._passed_over.clear()
        self._unreadable.clear()
        self._bad_sectors.clear()
        skipped = [Skipped(self._locate(fence_name(epoch)), why) for epoch, why in lineage.damaged.items()]
        damaged = [name for name in _quarantined(names) if lineage.is_live(name.fence_epoch, name.step)]
        live: list[Manifest] = []
        for name in _manifest_names(names):
            if not lineage.is_live(name.fence_epoch, name.step):
                skipped.append(Skipped(self._locate(name.data), lineage.explain(name.fence_epoch, name.step)))
                continue
            try:
                live.append(self._load(name))
            except CheckpointCorrupt as error:
                skipped.append(self._quarantine(name, error.message))
                damaged.append(name)
        for manifest in sorted(live, key=lambda m: m.rank, reverse=True):
            problem, loaded = self._verify_and_load(manifest, keep, load)
            if problem is None:
                newer = sorted((s for s in skipped if not _is_older(s, manifest)), key=lambda s: s.name, reverse=True)
                return replace(self._found(manifest, newer), loaded=loaded)
            if manifest.name in self._unreadable:
                self._refuse_to_pass_over(manifest, problem)
                self._passed_over.add(manifest.name)
                skipped.append(Skipped(self._locate(manifest.name.data), problem))
            else:
                skipped.append(self._quarantine(manifest.name, problem))
                damaged.append(manifest.name)
        self._refuse_to_start_over(damaged, skipped)
        return None

    def _verify_and_load(self, manifest: Manifest, keep: bool, load: Load | None) -> tuple[str | None, Any]:
        """What is wrong with a checkpoint, or what was loaded of it. Raises Vanished, and what `load` raises of a sound
        one."""
        if load is None or manifest.sharded:
            return self._verify(manifest, keep=keep), None
        path = self.medium.local(manifest.name.data)
        if not self.medium.in_place:
            problem = self._verify(manifest, keep=True)
            return problem, load(path) if problem is None else None
        loaded, doubtful, read = None, False, [0]
        with _quick_turns(), ThreadPoolExecutor(1, "orch-verify") as beside:
            verifying = beside.submit(self._verify, manifest, read.append)
            try:
                loaded = load(path)
            except Exception:  # noqa: BLE001 - explained by damage, or by an error that passes: else it comes again
                doubtful = True
            problem = verifying.result()
        if problem is not None:
            return problem, None
        if doubtful or sum(read) > manifest.size_bytes:  # what did not match at first was loaded at the same time
            loaded = None
            return None, load(path)
        return None, loaded

    def _found(self, manifest: Manifest, skipped: Iterable[Skipped], only: Container[str] | None = None) -> Found:
        names = [entry.name for entry in manifest.files if only is None or entry.name in only]
        return Found(manifest, {name: self.medium.local(name) for name in names}, tuple(skipped))

    def _refuse_to_pass_over(self, manifest: Manifest, problem: str) -> None:
        # An attempt that starts from an older one makes this one dead for good, and it may be fine a minute later.
        if manifest.name not in self._bad_sectors:
            raise CheckpointError(
                f"{self._locate(manifest.name.data)} cannot be read now: {problem}",
                hint="nothing was changed; resume the run when the cause is mended, or give that checkpoint up with "
                "`orch ckpt rollback`",
            )

    def _refuse_to_start_over(self, damaged: Sequence[CheckpointName], skipped: Sequence[Skipped]) -> None:
        # An attempt that starts from scratch makes every older checkpoint dead for good. When there was work to lose,
        # that is for a person to decide: a copy may exist, a server may come back.
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped)
        if self._unreadable:
            raise CheckpointError(
                f"no checkpoint in {self.uri} can be read: {reasons}",
                hint="nothing was changed; when the file system is well again, resume the run",
            )
        if damaged:
            raise CheckpointCorrupt(
                f"all {len(damaged)} checkpoints in {self.uri} are damaged"
                + (f": {reasons}" if reasons else " (set aside by an earlier attempt)"),
                hint="restore a copy of one of them (docs/checkpoints.md), "
                f"or move the *{CORRUPT_SUFFIX} files away to start from the beginning",
            )

    def _lineage(self, names: Iterable[str]) -> Lineage:
        fences: list[Fence] = []
        damaged: dict[int, str] = {}
        for name in names:
            if (epoch := parse_fence_name(name)) is None:
                continue
            try:
                fences.append(self._read_fence(epoch))
            except ValueError as error:
                damaged[epoch] = str(error)
        lineage = Lineage(fences, damaged=damaged)
        if not lineage.unknown:
            return lineage
        return lineage.recovered(dict(self._remembered_bases(names, lineage.unknown)))

    def _read_fence(self, epoch: int) -> Fence:
        """Raises ValueError when the content is damaged, OSError when it cannot be read at all."""
        for delay in RETRY_DELAYS_S:
            try:
                return parse_fence(self._fence_bytes(epoch), epoch=epoch)
            except ValueError:
                # Where hard links are not permitted, a fence is empty for a moment after its creation.
                self._sleep(delay)
        return parse_fence(self._fence_bytes(epoch), epoch=epoch)

    def _fence_bytes(self, epoch: int) -> bytes:
        for place in self._fences[:-1]:
            with suppress(FileNotFoundError):
                return place.read(fence_name(epoch))
        return self._fences[-1].read(fence_name(epoch))

    def _remembered_bases(self, names: Iterable[str], epochs: Sequence[int]) -> Iterator[tuple[int, int]]:
        for name in _manifest_names(names):
            if name.fence_epoch not in epochs:
                continue
            with suppress(CheckpointCorrupt, Vanished):  # whoever wants this checkpoint reports it
                base_step = self._load(name).base_step
                if base_step is not None:
                    yield name.fence_epoch, base_step

    def _load(self, name: CheckpointName, medium: Medium | None = None) -> Manifest:
        """Raises CheckpointCorrupt, Vanished, OSError."""
        try:
            data = (medium or self.medium).read(name.manifest)
        except FileNotFoundError as error:
            raise Vanished(name.manifest) from error
        return parse_manifest(data, file_name=name.manifest, directory=(medium or self.medium).uri)

    def _load_live(self, names: Iterable[str], lineage: Lineage) -> list[Manifest]:
        """Live manifests, newest first; those that are damaged or were just collected are left out."""
        loaded = []
        for name in _manifest_names(names):
            if lineage.is_live(name.fence_epoch, name.step):
                with suppress(CheckpointCorrupt, Vanished):  # `find` is the one that reports and quarantines
                    loaded.append(self._load(name))
        return sorted(loaded, key=lambda m: m.rank, reverse=True)

    # --- verifying

    def verify(self, manifest: Manifest, *, reading: Reading | None = None) -> str | None:
        """Read the bytes of a committed checkpoint again: what does not match its manifest, or None. Changes nothing.

        Raises CheckpointError when it was removed meanwhile, or the store cannot be read.
        """
        try:
            with self._translated("read"):
                return self._verify(manifest, reading)
        except Vanished as vanished:
            raise CheckpointError(
                f"{vanished} was removed while it was read", hint="checkpoint.keep_last says how many stay"
            ) from None

    def is_unreadable(self, manifest: Manifest) -> bool:
        """Whether the last problem with it was that it could not be read: that says nothing about its content."""
        return manifest.name in self._unreadable

    def _verify(
        self,
        manifest: Manifest,
        reading: Reading | None = None,
        *,
        keep: bool = False,
        only: Container[str] | None = None,
    ) -> str | None:
        """What is wrong with the bytes of a checkpoint (of these files of it), or None. Raises Vanished."""
        index = manifest.name.part(INDEX_PART)
        for entry in manifest.files:
            if only is not None and entry.name not in only:
                continue
            problem = self.medium.examine(
                entry,
                committed=lambda: manifest.name.manifest in self.medium.names(),
                keep=keep or entry.name == index,
                reading=reading,
            )
            if problem is not None:
                if not problem.certain:
                    self._unreadable.add(manifest.name)
                if problem.lasting:
                    self._bad_sectors.add(manifest.name)
                return problem.words
        if only is not None:
            return None
        self._unreadable.discard(manifest.name)
        problem_of_all = self._incomplete(manifest) if manifest.sharded else None
        if problem_of_all is None:
            self._read_back.add(manifest.name)
        return problem_of_all

    def _incomplete(self, manifest: Manifest) -> str | None:
        """What a sharded checkpoint lacks although all the files that it lists are as they should be."""
        index = manifest.name.part(INDEX_PART)
        try:
            return parse_index(self.medium.local(index).read_bytes(), file_name=index).problem(manifest.parts())
        except CheckpointCorrupt as error:
            return error.message

    def _quarantine(self, name: CheckpointName, reason: str) -> Skipped:
        """Set a damaged checkpoint aside, manifest first so that nobody else takes it; nothing is ever deleted."""
        location = self._locate(name.data)
        self._passed_over.add(name)
        try:
            names = sorted(self.medium.names(), key=lambda n: n != name.manifest)
            self.medium.set_aside(n for n in names if n.startswith(name.stem + ".") and CORRUPT_SUFFIX not in n)
        except OSError as error:  # a read-only mount: the checkpoint is passed over all the same
            return Skipped(location, f"{reason} (could not be set aside: {describe(error)})")
        return Skipped(location, f"{reason}; set aside as {name.data}{CORRUPT_SUFFIX}")

    def _locate(self, name: str) -> str:
        return f"{self.uri}/{name}"

    # --- writing

    def open_epoch(
        self, *, attempt: int, base: Manifest | None, discard_newer: bool = False, trace: Trace | None = None
    ) -> Fence:
        """Claim the run for `attempt`, going on from `base`; from now on older attempts are fenced.

        Raises Fenced when a later attempt already owns the run, CheckpointError when a live checkpoint newer than
        `base` exists (unless `discard_newer`: it would become invisible), `base` does not count any more, or the claim
        cannot be written.
        """
        note = trace or _untraced
        with self._translated("open a fence epoch"):
            note("fence-directory")
            self._claims.prepare()
            while True:
                names = self._names()
                fence = self._next_fence(names, attempt, base, discard_newer)
                note("fence-create")
                if not self._claim(fence, note):
                    continue
                note("fence-check")
                if self._confirm_epoch(fence, base):
                    break
        if base is not None:
            self._point_to(base.name, fence, note)  # it may still name a checkpoint that was set aside
        return fence

    def _next_fence(self, names: Sequence[str], attempt: int, base: Manifest | None, discard_newer: bool) -> Fence:
        lineage = self._lineage(names)
        if newer := lineage.newer_attempt(attempt):
            raise Fenced(
                f"attempt {attempt} starts too late: {newer.holder} already owns this run (fence epoch {newer.epoch})",
                hint="the run goes on in the other attempt. If there is none, because the run directory was removed "
                f"and its checkpoints were not, remove {self.uri} too",
            )
        if base is not None and not lineage.is_live(base.fence_epoch, base.step):
            # A fence was seen too late by the reader: to go on from there would bury the work of the attempt behind it.
            raise CheckpointError(
                f"the checkpoint of step {base.step} does not count any more: "
                + lineage.explain(base.fence_epoch, base.step),
                hint="look for the newest checkpoint again and start from that",
            )
        if not discard_newer:
            self._require_newest(base, self._load_live(names, lineage))
        # Numbers in file names count too: a directory whose fences were lost must not hand out a number twice.
        used = (name.fence_epoch for n in names if (name := CheckpointName.of(n)))
        return Fence(
            epoch=max((lineage.highest, *used)) + 1,
            attempt=attempt,
            base_step=base.step if base else FROM_SCRATCH,
            base=base.name.manifest if base else None,
            node=self._node,
            pid=os.getpid(),
            nonce=os.urandom(8).hex(),
            opened_at=self._clock(),
            bases=dict(sorted(lineage.bases.items())[-REMEMBERED_BASES:]),
        )

    def _require_newest(self, base: Manifest | None, live: Sequence[Manifest]) -> None:
        # An older attempt that is still alive may have committed since the base was chosen. To claim the run now would
        # bury that work, and its garbage collection may be about to remove our base.
        for manifest in live:
            if (base is None or manifest.rank > base.rank) and manifest.name not in self._passed_over:
                start = "from scratch" if base is None else f"at step {base.step}"
                raise CheckpointError(
                    f"attempt {manifest.attempt} has committed step {manifest.step}; starting {start} would discard it",
                    hint="look for the newest checkpoint again and start from that",
                )

    def _claim(self, fence: Fence, note: Trace) -> bool:
        """Create the fence exclusively; False when the number is taken."""

        def mine(content: bytes) -> bool:
            try:
                return parse_fence(content, epoch=fence.epoch).nonce == fence.nonce
            except ValueError:
                return False

        return self._claims.create(fence.file_name, fence.render(), note=note, mine=mine)

    def _rival(self, fence: Fence) -> Fence | None:
        """Whoever's fence all readers see in the place of this one.

        Two can have the same number: where a store ignores the condition, or one claimed it on the disk and the other
        in the store.
        """
        with suppress(FileNotFoundError, ValueError):  # of an emergency save the fence lies elsewhere; damage is nobody
            seen = parse_fence(self._fence_bytes(fence.epoch), epoch=fence.epoch)
            if seen.nonce != fence.nonce:
                return seen
        return None

    def _confirm_epoch(self, fence: Fence, base: Manifest | None) -> bool:
        """Look again now that the epoch exists; what happened in between is either visible or bounded by it.

        False when an attempt that is not newer has the same number: then another one will settle it.
        """
        if rival := self._rival(fence):
            if rival.attempt > fence.attempt:
                raise _fenced(fence.attempt, rival)
            return False
        names = self._names()
        lineage = self._lineage(names)
        if successor := lineage.successor(fence):
            raise _fenced(fence.attempt, successor)
        if base is not None and base.name.manifest not in names:
            # Its owner went on and collected it while we were paused. Keeping the epoch would bury all its later work.
            self._claims.replace(fence.file_name, replace(fence, withdrawn=True).render())
            raise CheckpointError(
                f"{base.name.manifest} was removed while this attempt was starting",
                hint="look for the newest checkpoint again and start from that",
            )
        return True

    def commit(
        self,
        fence: Fence,
        write: Callable[[BinaryIO], object],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        trace: Trace | None = None,
        **origin: Unpack[Origin],
    ) -> Manifest:
        """Publish what `write` writes as the checkpoint of `step`; on return it is durable.

        `metrics` are what `keep_best` chooses by (NaN and infinity are left out).

        Raises Fenced when a newer attempt owns the run, CheckpointError when it could not be written (then the previous
        checkpoint stands); what `write` raises itself passes through.
        """
        name = self.begin(fence, step=step, trace=trace)
        try:
            entry = self.write_part(name, write, trace=trace)
        except CheckpointError:
            self._require_ownership(fence)  # the newer attempt sweeps our files: then that is the news, not ENOENT
            raise
        return self.publish(fence, name, [entry], epoch=epoch, metrics=metrics, trace=trace, **origin)

    def begin(self, fence: Fence, *, step: int, trace: Trace | None = None) -> CheckpointName:
        """First step of a commit in parts (`begin`, any number of `write_part`, `publish`): the name of its files.

        Raises Fenced, CheckpointError. Nothing is written yet.
        """
        (trace or _untraced)("check-before")
        self._require_ownership(fence)
        return CheckpointName.fresh(step, fence.epoch)

    def write_part(
        self,
        name: CheckpointName,
        write: Callable[[BinaryIO], object],
        *,
        part: str | None = None,
        trace: Trace | None = None,
    ) -> FileEntry:
        """Make what `write` writes one file of the checkpoint, durable on return; no reader looks at it yet.

        Any rank of the attempt may do this, each with a `part` of its own (`shard-0001.ckpt`); None is the file that
        every checkpoint has. Raises CheckpointError when it could not be written, and leaves nothing; what `write`
        raises itself passes through.
        """
        file_name = name.data if part is None else name.part(part)
        try:
            entry = self.medium.write_data(file_name, write, note=trace or _untraced)
            if entry.size == 0:
                raise CheckpointError(
                    f"the checkpoint of step {name.step} is empty: nothing was written to {file_name}",
                    hint="the function given to commit() must write to the file it is given",
                )
        except OSError as error:
            self._take_back([file_name])
            raise self.medium.failure(error, f"write the checkpoint of step {name.step}") from error
        except BaseException:
            self._take_back([file_name])
            raise
        return entry

    def publish(
        self,
        fence: Fence,
        name: CheckpointName,
        files: Sequence[FileEntry],
        *,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        trace: Trace | None = None,
        **origin: Unpack[Origin],
    ) -> Manifest:
        """Make the checkpoint of these files visible: manifest, ownership, pointer. The first has no `part`.

        Raises as `commit` does; when the manifest could not be written, all files of that name are removed.
        """
        note = trace or _untraced
        check_files(files, name)
        manifest = Manifest(
            step=name.step,
            epoch=epoch,
            attempt=fence.attempt,
            fence_epoch=name.fence_epoch,
            nonce=name.nonce,
            files=tuple(files),
            committed_at=self._clock(),
            directory=self.uri,
            sequence=next(_commits),
            base_step=fence.base_step,
            metrics=finite(metrics or {}),
            **origin,
        )
        try:
            self.medium.write_manifest(name.manifest, manifest.render(), note=note)
        except OSError as error:
            self.abandon(fence, name)
            raise self.medium.failure(error, f"write the checkpoint of step {name.step}") from error
        except BaseException:
            self._discard(name)
            raise
        note("check-after")
        self._require_ownership(fence)
        self._point_to(name, fence, note)
        # Renaming the pointer may have been the moment of the take-over: better to know now than at the next save.
        note("check-last")
        self._require_ownership(fence)
        return manifest

    def adopt(self, manifest: Manifest, source: Medium, *, reading: Reading | None = None) -> bool:
        """Publish here, under the same name, what was committed in `source`; False when it is not live here.

        For saves that had no time for this store. Raises CheckpointCorrupt, CheckpointError.
        """
        name = manifest.name
        with self._translated(f"bring in the checkpoint of step {manifest.step}"):
            names = self._names()
            if not self._lineage(names).is_live(name.fence_epoch, name.step):
                return False
            if name.manifest in names:
                return True
            for entry in manifest.files:
                self._bring_in(entry, source, reading)
            self.medium.write_manifest(name.manifest, manifest.render(), note=_untraced)
            names = self._names()
            if not {entry.name for entry in manifest.files}.issubset(names):
                # Meanwhile a running attempt has swept data that had no manifest yet; it must not look like damage.
                self.medium.remove((name.manifest,))
                return False
            lineage = self._lineage(names)
            if not lineage.is_live(name.fence_epoch, name.step):  # an attempt has started without it meanwhile
                self._discard(name)
                return False
            if [newest.name for newest in self._load_live(names, lineage)[:1]] == [name]:
                self.medium.point_to(name.data, epoch=name.fence_epoch, note=_untraced)
        return True

    def _bring_in(self, entry: FileEntry, source: Medium, reading: Reading | None) -> None:
        path = source.local(entry.name)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            raise CheckpointCorrupt(
                f"the content of {path} does not match its hash",
                hint="it was not taken over; an older checkpoint stands",
            )
        self.medium.put(entry.name, path, reading=reading)

    def abandon(self, fence: Fence, name: CheckpointName) -> None:
        """Remove what was written under a name that will not be published. Raises Fenced when a newer attempt owns the
        run: then that is why the save failed."""
        self._discard(name)
        self._require_ownership(fence)

    def _discard(self, name: CheckpointName) -> None:
        """Take back a save that failed. Manifest first: while it exists, its data must."""
        self._take_back([name.manifest])
        try:
            names = self.medium.names()
        except OSError as error:
            self._warn_of_leftovers(name.stem, error)
        else:
            self._take_back(n for n in names if CheckpointName.of(n) == name)

    def _take_back(self, names: Iterable[str]) -> None:
        names = list(names)
        try:
            self.medium.remove(names)
        except OSError as error:
            self._warn_of_leftovers(", ".join(names), error)

    def _warn_of_leftovers(self, what: str, error: OSError) -> None:
        # The failure of the save itself is raised; what is left is for the next attempt to sweep.
        _log.warning("could not remove %s: %s", self._locate(what), describe(error))

    def _point_to(self, name: CheckpointName, fence: Fence, note: Trace) -> None:
        try:
            self.medium.point_to(name.data, epoch=fence.epoch, note=note)
        except OSError as error:
            # The checkpoint is committed and every reader of ours finds it; to report a failed save would be wrong.
            _log.warning("%s was not updated to %s: %s", self._locate(POINTER), name.data, describe(error))

    def _correct_pointer(self, newest: Manifest, fence: Fence, note: Trace) -> None:
        # A replaced attempt may have swapped it late: it must not be left naming a file that is about to be removed.
        if self.medium.pointer() not in (None, newest.name.data):
            self._point_to(newest.name, fence, note)

    def discard(self, names: Sequence[CheckpointName]) -> list[str]:
        """Remove these checkpoints, whether they count or not; returns the names of files. Raises CheckpointError."""
        with self._translated("remove checkpoints"):
            return self._remove(names, self.medium.names(), _untraced)

    def _require_ownership(self, fence: Fence) -> None:
        with self._translated("check who owns the run"):
            if rival := self._rival(fence):
                raise _fenced(fence.attempt, rival)
            epochs = (parse_fence_name(name) or 0 for name in _fence_names(self._fences))
            if max(epochs, default=0) <= fence.epoch:
                return
            if successor := self._lineage(self._names()).successor(fence):
                raise _fenced(fence.attempt, successor)

    # --- garbage

    def collect_garbage(
        self,
        fence: Fence,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        trace: Trace | None = None,
    ) -> list[str]:
        """Remove live checkpoints that no rule keeps (`retention.kept`), and dead ones; returns the names removed.

        Reads the newest back first: CheckpointCorrupt, and nothing is removed, when it does not match. The best are
        read back once by each instance; a damaged one is set aside and the next takes its place. Leftovers of older
        attempts are swept. Raises Fenced, CheckpointError.
        """
        note = trace or _untraced
        retention = Retention(keep_last, keep_every, keep_best)
        self._require_ownership(fence)
        with self._translated("remove old checkpoints"):
            names = self._names()
            lineage = self._lineage(names)
            if lineage.unknown:
                # With an unknown base a dead checkpoint may look like the newest live one: remove nothing.
                _log.warning("not removing old checkpoints: %s", "; ".join(lineage.damaged.values()))
                return []
            live = self._load_live(names, lineage)
            victims = self._victims(names, lineage, live, kept(live, retention), fence.epoch)
            if victims:
                note("gc-verify")
                self._require_readable(live[0], fence)
                if retention.keep_best is not None:
                    self._tell_of_unknown_metric(live, retention.keep_best)
                    victims = self._victims(names, lineage, live, self._sound(live, retention, fence), fence.epoch)
                self._correct_pointer(live[0], fence, note)
            removed = self._remove(victims, names, note)
            note("gc-sweep")
            return removed + self._sweep(names, fence)

    def _tell_of_unknown_metric(self, live: Sequence[Manifest], wanted: Best) -> None:
        # A misspelt name would let every checkpoint go that somebody meant to keep.
        if not self._told_of_metric and not any(wanted.metric in manifest.metrics for manifest in live):
            self._told_of_metric = True
            known = ", ".join(sorted({name for manifest in live for name in manifest.metrics})) or "none"
            _log.warning("keep_best: no checkpoint knows the metric %r yet (known: %s)", wanted.metric, known)

    def garbage(self, *, keep_last: int, keep_every: int | None = None, keep_best: Best | None = None) -> list[str]:
        """Names that the next attempt's collection would remove if all bytes match. Changes nothing."""
        with self._translated("list"):
            names = self._names()
            lineage = self._lineage(names)
            if lineage.unknown:
                return []
            live = self._load_live(names, lineage)
            epoch = lineage.highest + 1
            keep = kept(live, Retention(keep_last, keep_every, keep_best))
            victims = self._victims(names, lineage, live, keep, epoch)
            doomed = [name.manifest for name in victims] + _data_of(victims, names)
            left = set(names) - set(doomed)
            return doomed + [name for name in names if name in left and self._is_leftover(name, epoch, left)]

    def _victims(
        self,
        names: Iterable[str],
        lineage: Lineage,
        live: Sequence[Manifest],
        keep: set[CheckpointName],
        epoch: int,
    ) -> list[CheckpointName]:
        """What the attempt of this fence epoch may remove: live ones that nobody wants, dead ones of older epochs."""
        if not live:
            return []
        unwanted = [manifest.name for manifest in live if manifest.name not in keep]
        dead = [
            name
            for name in _manifest_names(names)
            if name.fence_epoch < epoch and not lineage.is_live(name.fence_epoch, name.step)
        ]
        return [name for name in (*unwanted, *dead) if not self._is_spared(name)]

    def _is_spared(self, name: CheckpointName) -> bool:
        """Whether errors alone made it dead, or it could not be set aside: somebody may still want its bytes."""
        return name in self._passed_over or name in self._unreadable

    def _sound(self, live: Sequence[Manifest], retention: Retention, fence: Fence) -> set[CheckpointName]:
        """What stays, after the best were read back: a damaged one must not push out a valid one."""
        assert retention.keep_best is not None
        rivals = list(live)
        useless: set[CheckpointName] = set()  # not removed either: its content may be fine, or is for a person to see
        while doubtful := [m for m in best(rivals, retention.keep_best) if m.name not in self._read_back]:
            problem = self._read_again(doubtful[0], fence)
            if problem is None:
                continue
            rivals.remove(doubtful[0])
            useless.add(doubtful[0].name)
            if doubtful[0].name not in self._unreadable:
                _log.warning("%s", self._quarantine(doubtful[0].name, problem).reason)
        return kept(rivals, retention) | useless

    def _require_readable(self, newest: Manifest, fence: Fence) -> None:
        problem = self._read_again(newest, fence)
        if problem is None:
            return
        if newest.name not in self._unreadable:
            problem = self._quarantine(newest.name, problem).reason
        raise CheckpointCorrupt(
            f"the checkpoint of step {newest.step} does not read back: {problem}",
            hint="the older checkpoints were kept; check the file system and the memory of this node",
        )

    def _read_again(self, manifest: Manifest, fence: Fence) -> str | None:
        try:
            problem = self._verify(manifest)
        except Vanished as error:
            self._require_ownership(fence)
            raise CheckpointError(
                f"{manifest.name.manifest} was removed by somebody else",
                hint=f"nothing was removed by orch; find out who else removes files in {self.uri}",
            ) from error
        self._require_ownership(fence)  # reading back takes long enough for a newer attempt to start
        return problem

    def _remove(self, victims: Sequence[CheckpointName], names: Iterable[str], note: Trace) -> list[str]:
        """Manifests first, durably: a manifest without its data would look like corruption."""
        note("gc-unlink-manifest")
        removed = self.medium.remove(name.manifest for name in victims)
        if victims:
            note("gc-dirsync")
            self.medium.sync()
        note("gc-unlink-data")
        return removed + self.medium.remove(_data_of(victims, names))

    def sweep(self, fence: Fence) -> list[str]:
        """Remove what attempts of older epochs left half done; returns the names. Raises CheckpointError."""
        with self._translated("remove what was left half done"):
            return self._sweep(self.medium.names(), fence)

    def _sweep(self, names: Sequence[str], fence: Fence) -> list[str]:
        """Remove what attempts of older epochs left half done. Our own epoch's files may be in the making."""
        aborted = self.medium.abort_uploads(fence.epoch)
        there = set(self.medium.names())  # some of `names` have just been removed
        left = (name for name in names if name in there and self._is_leftover(name, fence.epoch, there))
        return aborted + self.medium.remove(left)

    def _is_leftover(self, file_name: str, epoch: int, committed: set[str]) -> bool:
        if self.medium.is_stale(file_name, epoch):
            return True
        name = _part_of(file_name)
        if name is None or name.fence_epoch >= epoch or self._is_spared(name):
            return False
        return name.manifest not in committed

    # --- errors

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.medium.failure(error, doing) from error


@contextmanager
def _quick_turns() -> Iterator[None]:
    """The interpreter's lock changes hands soon when somebody asks for it.

    `load` holds it while it reads a tensor, and the thread that compares needs it for every piece: with the usual 5 ms
    each time it has hardly begun when the load is done.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _untraced(operation: str) -> None:
    """The trace of a caller that wants none."""


def _fenced(attempt: int, successor: Fence) -> Fenced:
    who = successor.holder if successor.attempt >= 0 else "another attempt"
    return Fenced(
        f"attempt {attempt} no longer owns this run: {who} took over (fence epoch {successor.epoch})",
        hint="this attempt stops and is not restarted; the run goes on in the other one",
    )


def describe(error: OSError) -> str:
    """The error in words, with its name."""
    code = errno.errorcode.get(error.errno or 0, "OSError")
    return f"{error.strerror or error} ({code})"


def _manifest_names(names: Iterable[str]) -> list[CheckpointName]:
    return [name for n in names if (name := CheckpointName.parse(n, MANIFEST_SUFFIX))]


def _fence_names(places: Iterable[Medium]) -> set[str]:
    return {name for place in places for name in place.names() if parse_fence_name(name) is not None}


def _part_of(file_name: str) -> CheckpointName | None:
    """The checkpoint that a file holds data of; None for a manifest and for anything else."""
    name = CheckpointName.of(file_name)
    return None if name is None or file_name == name.manifest else name


def _data_of(victims: Sequence[CheckpointName], names: Iterable[str]) -> list[str]:
    gone = set(victims)
    return [n for n in names if (name := _part_of(n)) is not None and name in gone]


def _rank(name: CheckpointName) -> tuple[int, int, int, str]:
    """Where a checkpoint whose manifest cannot be read stands in a listing."""
    return (name.step, name.fence_epoch, -1, name.nonce)


def _quarantined(names: Iterable[str]) -> list[CheckpointName]:
    """Checkpoints whose manifest was set aside (`….json.corrupt`, or `….json.corrupt.1` and so on)."""
    originals = (n.partition(CORRUPT_SUFFIX)[0] for n in names if CORRUPT_SUFFIX in n)
    return _manifest_names(originals)


def _is_older(skipped: Skipped, manifest: Manifest) -> bool:
    name = CheckpointName.parse(skipped.name, DATA_SUFFIX)
    return name is not None and name < manifest.name
