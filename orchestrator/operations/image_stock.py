"""`image pull`, `verify` and `prune`: the images that are here, in an engine of this machine or as files of a root."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.containers.image_cache import SUFFIXES, CachedImage, ImageCache
from orchestrator.containers.image_file import difference
from orchestrator.containers.payload import PullReport, open_engine
from orchestrator.containers.process import sweep_scratch
from orchestrator.errors import ContainerError, RegistryError, SpecError
from orchestrator.operations.describe import records_of
from orchestrator.operations.image_results import CheckedImage, PrunedImages, PulledImage
from orchestrator.operations.record import agent_plan
from orchestrator.operations.roots import known_roots
from orchestrator.operations.state import is_settled
from orchestrator.paths import RootPaths
from orchestrator.spec import load_site, resolve_root
from orchestrator.spec.images import (
    NAME,
    digest_of,
    file_pin,
    find_lock,
    image_refusal,
    read_lock,
    runtime_refusal,
    without_tag,
)
from orchestrator.spec.site import RUNTIMES
from orchestrator.spec.units import Duration, Memory


def pull_image(
    reference: str,
    *,
    runtime: str | None = None,
    root: str | Path | None = None,
    report: PullReport | None = None,
    environ: Mapping[str, str] = os.environ,
) -> PulledImage:
    """Fetch an image before a run needs it: into this machine's engine, or as a file that all nodes see.

    `reference` is a pin or a name of the lock file; the runtime is the site profile's unless given, else docker.
    Raises SpecError, ContainerError.
    """
    runtime = _runtime(runtime, environ)
    image = _pin(reference)
    if file_pin(image) is not None:
        raise SpecError(f"{image} is a file already", hint="`orch image verify` compares it with its hash")
    if reason := runtime_refusal(image, runtime):
        raise SpecError(reason)
    if runtime in SUFFIXES:
        cache = _cache(root, environ)
        there = cache.find(image, runtime) is not None
        entry = cache.fetch(image, runtime)
        return PulledImage(image, runtime, str(entry.path), entry.size_bytes, there)
    engine = open_engine(runtime, environ)
    there = engine.has_image(image)
    engine.ensure_image(image, report)
    return PulledImage(image, runtime, None, None, there)


def verify_images(
    references: Sequence[str] = (),
    *,
    runtime: str | None = None,
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[CheckedImage]:
    """Compare images with their pins: files are read whole, an engine is asked for what it has under the digest.

    Without references: every name of the lock file, and every imported file of the root. Raises SpecError.
    """
    runtime = _runtime(runtime, environ)
    cache = _cache(root, environ)
    pins = [_pin(reference) for reference in references] or sorted(set(_names().values()))
    checked = [_check(pin, runtime, cache, environ) for pin in pins]
    done = {found.path for found in checked}
    if not references:
        checked += [_check_entry(entry) for entry in cache.entries() if str(entry.path) not in done]
    return checked


def prune_images(
    *,
    max_age: str | None = None,
    max_size: str | None = None,
    dry_run: bool = False,
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> PrunedImages:
    """Remove imported files that nobody has used for `max_age` (`30d`), and then the least recently used ones.

    `max_size` (`200G`) is what the rest may take. What a run may still start from stays, and so does what is being
    imported. Raises SpecError, RegistryError.
    """
    if max_age is None and max_size is None:
        raise SpecError("nothing says what to remove", hint="give --max-age (30d), --max-size (200G) or both")
    limits = _limits(max_age, max_size)
    cache = _cache(root, environ)
    entries = cache.entries()
    doomed = _beyond(entries, *limits, keep=_digests_of_runs(root, environ))
    removed = [entry for entry in doomed if dry_run or cache.remove(entry)]
    if not dry_run:
        sweep_scratch(cache.directory)
    left = [entry for entry in entries if entry not in removed]
    return PrunedImages(
        tuple(PulledImage(e.image, _runtime_of(e), str(e.path), e.size_bytes, True) for e in removed),
        sum(entry.size_bytes for entry in removed),
        sum(entry.size_bytes for entry in left),
        dry_run,
    )


# --- what is asked for


def _runtime(given: str | None, environ: Mapping[str, str]) -> str:
    runtime = given or load_site(environ).runtime or "docker"
    known = [name for name in RUNTIMES if name != "none"]
    if given is None and runtime == "none":
        return "docker"
    if runtime not in known:
        raise SpecError(f"{runtime!r} runs no images", hint=f"--runtime is one of {', '.join(known)}")
    return runtime


def _cache(root: str | Path | None, environ: Mapping[str, str]) -> ImageCache:
    return ImageCache(RootPaths(resolve_root(root or load_site(environ).root, environ)).images, environ)


def _names() -> Mapping[str, str]:
    lock = find_lock(Path.cwd())
    return {} if lock is None else {name: str(entry["image"]) for name, entry in read_lock(lock).images.items()}


def _pin(reference: str) -> str:
    """What a name stands for, or the pin itself."""
    if NAME.fullmatch(reference) and (pin := _names().get(reference)):
        return without_tag(pin)
    if reason := image_refusal(reference):
        raise SpecError(reason)
    return without_tag(reference)


def _limits(max_age: str | None, max_size: str | None) -> tuple[float | None, int | None]:
    try:
        age = None if max_age is None else float(Duration.parse(max_age))
        size = None if max_size is None else int(Memory.parse(max_size))
    except ValueError as error:
        raise SpecError(str(error)) from error
    return age, size


# --- verify


def _check(pin: str, runtime: str, cache: ImageCache, environ: Mapping[str, str]) -> CheckedImage:
    if (file := file_pin(pin)) is not None:
        return CheckedImage(pin, file[0], difference(Path(file[0]), digest_of(pin)))
    if runtime in SUFFIXES:
        entry = cache.find(pin, runtime)
        missing = f"not imported; `orch image pull {pin} --runtime {runtime}`"
        return CheckedImage(pin, None, missing) if entry is None else _check_entry(entry)
    try:
        here = open_engine(runtime, environ).has_image(pin)
    except ContainerError as error:
        return CheckedImage(pin, None, error.message)
    return CheckedImage(pin, None, None if here else f"{runtime} of this machine does not have it")


def _check_entry(entry: CachedImage) -> CheckedImage:
    return CheckedImage(entry.image, str(entry.path), entry.problem())


# --- prune


def _beyond(
    entries: Sequence[CachedImage], age: float | None, most: int | None, *, keep: set[str]
) -> list[CachedImage]:
    """Too old ones, then, least recently used first, as many as it takes; only the user's own."""
    free = [entry for entry in entries if entry.digest not in keep and _is_ours(entry.path)]
    now, total = time.time(), sum(entry.size_bytes for entry in entries)
    doomed = []
    for entry in free:
        too_old = age is not None and now - entry.used_at > age
        if too_old or (most is not None and total > most):
            doomed.append(entry)
            total -= entry.size_bytes
    return doomed


def _is_ours(path: Path) -> bool:
    """Whose runs need another user's file cannot be told."""
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _digests_of_runs(root: str | Path | None, environ: Mapping[str, str]) -> set[str]:
    """Of runs that may start again. Raises RegistryError where one cannot be read: it may be one of them."""
    places = {*known_roots(environ), resolve_root(root or load_site(environ).root, environ)}
    records, unreadable = records_of(places)
    for run_id, error in unreadable.items():
        raise RegistryError(
            f"whether {run_id} needs an image cannot be told: {error.message}", hint="mend that run or move it aside"
        )
    alive = [record.paths for record in records if not is_settled(record)]
    # One without a plan was not started by `orch submit`: it has no image of ours.
    plans = [agent_plan(paths) for paths in alive if paths.agent_plan.exists()]
    return {digest_of(str(plan["container"]["image"])) for plan in plans}


def _runtime_of(entry: CachedImage) -> str:
    return next(runtime for runtime, suffix in SUFFIXES.items() if entry.path.suffix == suffix)
