"""`image lock`: a tag becomes the reference that cannot change under a running job, and a name stands for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.containers.image_file import sha256_of
from orchestrator.errors import ContainerError, SpecError
from orchestrator.files import write_atomic
from orchestrator.operations.image_results import LockedImage, NamedImage
from orchestrator.spec.images import (
    LOCK_FILE,
    NAME,
    ImageLock,
    file_pin,
    find_lock,
    image_refusal,
    read_lock,
    repository_of,
)

ENGINE_TIMEOUT_S = 60


def name_image(reference: str, name: str, directory: Path | None = None) -> NamedImage:
    """Lock a tag (a pin is taken as it is), and write it under a name into the lock file at or above `directory`.

    Without such a file one is made there. Raises ContainerError, SpecError.
    """
    if not NAME.fullmatch(name):
        raise SpecError(f"{name!r} is not a name", hint="use lower-case letters and digits, with . _ or - between them")
    base = Path(os.path.abspath(directory or "."))  # noqa: PTH100 - resolve() would leave the folder the user is in
    # Specs in any folder use the name, so a file's path must not depend on one.
    reference = str(base / reference) if file_pin(reference) is not None else reference
    pinned = image_refusal(reference) is None and file_pin(reference) is None
    image = LockedImage(reference, reference, "given") if pinned else lock_image(reference)
    path = find_lock(base) or base / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            images = dict(read_lock(path).images) if path.exists() else {}
            before = images.get(name)
            images[name] = {"image": image.image, "from": reference}
            write_atomic(path, ImageLock(path, images).render())
    except BlockingIOError as error:
        raise SpecError(f"another `orch image lock` is writing {path}", hint="run the same command again") from error
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror or error}") from error
    return NamedImage(name, image, str(path), None if before is None else str(before["image"]))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One writer of the lock file at a time; the lock is the directory's, so that it leaves no file to commit."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def list_images(directory: Path | None = None) -> list[NamedImage]:
    """The names of the nearest lock file at or above `directory`, and what they pin. Raises SpecError."""
    path = find_lock(Path.cwd() if directory is None else directory)
    if path is None:
        return []
    entries = sorted(read_lock(path).images.items())
    return [
        NamedImage(name, LockedImage(str(entry.get("from", "")), str(entry["image"]), "lock"), str(path), None)
        for name, entry in entries
    ]


def lock_image(reference: str) -> LockedImage:
    """Resolve a tag with the engine of this machine: repository digest, else local image id.

    docker asks the registry when the image is not here (nothing is pulled); podman, where there is no docker, knows its
    own images. An image file is read and pinned by its hash. Raises ContainerError.
    """
    if (file := file_pin(reference)) is not None:
        return _locked_file(*file)
    from orchestrator.containers.docker import connect

    try:
        client = connect(timeout_s=ENGINE_TIMEOUT_S)
    except ContainerError as error:
        if shutil.which("podman") is None:
            raise
        return _of_podman(reference, error)
    try:
        return _resolve(client, reference)
    finally:
        client.close()


def _locked_file(path: str, digest: str | None) -> LockedImage:
    try:
        found = f"sha256:{sha256_of(Path(path))}"
    except OSError as error:
        raise ContainerError(
            f"{path}: {error.strerror or error}", hint="name an image file that you may read"
        ) from error
    if digest not in (None, found):
        raise ContainerError(
            f"{path} is not {digest}: its content is {found}", hint=f"to pin what is there now:  orch image lock {path}"
        )
    return LockedImage(path, f"{path}@{found}", "file")


def _of_podman(reference: str, silence: ContainerError) -> LockedImage:
    from orchestrator.containers.podman import Podman
    from orchestrator.containers.process import words_of

    done = Podman().run("image", "inspect", "--format=json", reference)
    if done.returncode != 0:
        raise ContainerError(
            f"{silence.message}; and podman has no image {reference}: {words_of(done.stderr)}",
            hint=f"start docker, or fetch it with podman first:  podman pull {reference}",
        )
    (found,) = json.loads(done.stdout)
    return _locked(reference, found.get("RepoDigests") or (), f"sha256:{found['Id']}")


def _resolve(client: Any, reference: str) -> LockedImage:
    import docker

    try:
        image = client.images.get(reference)
        return _locked(reference, image.attrs.get("RepoDigests") or (), str(image.id))
    except docker.errors.ImageNotFound:
        return _remote(client, reference)
    except (docker.errors.DockerException, OSError, ValueError) as error:
        raise ContainerError(f"{reference}: {_words(error)}", hint="write it as repository:tag") from error


def _locked(reference: str, repo_digests: Sequence[str], identifier: str) -> LockedImage:
    """RepoDigests is empty until an image was pushed or pulled; then only this engine's own id pins it (FACTS 4)."""
    digests = [digest for digest in map(str, repo_digests) if not digest.startswith("localhost/")]
    repository = repository_of(reference)
    chosen = next((digest for digest in digests if digest.partition("@")[0] == repository), None)
    if chosen is None and digests:
        chosen = digests[0]
    if chosen is not None:
        return LockedImage(reference, chosen, "registry")
    return LockedImage(reference, identifier, "local")


def _remote(client: Any, reference: str) -> LockedImage:
    import docker

    try:
        digest = client.images.get_registry_data(reference).id
    except (docker.errors.DockerException, OSError, ValueError) as error:
        raise ContainerError(
            f"no image {reference}: it is not on this machine, and its registry says: {_words(error)}",
            hint="`docker images` lists what is here; build or pull it first, or correct the name",
        ) from error
    return LockedImage(reference, f"{repository_of(reference)}@{digest}", "registry")


def _words(error: BaseException) -> str:
    explanation = getattr(error, "explanation", None)
    return " ".join(str(explanation or error).split())[:300]
