"""`image lock`: a tag becomes the reference that cannot change under a running job."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import ContainerError
from orchestrator.operations.results import LockedImage

ENGINE_TIMEOUT_S = 60


def lock_image(reference: str) -> LockedImage:
    """Resolve a tag with the docker engine of this machine: repository digest, else local image id.

    Asks the registry when the image is not here (nothing is pulled). Raises ContainerError.
    """
    from orchestrator.containers.docker import connect

    client = connect(timeout_s=ENGINE_TIMEOUT_S)
    try:
        return _resolve(client, reference)
    finally:
        client.close()


def _resolve(client: Any, reference: str) -> LockedImage:
    import docker

    try:
        return _local(client.images.get(reference), reference)
    except docker.errors.ImageNotFound:
        return _remote(client, reference)
    except (docker.errors.DockerException, OSError, ValueError) as error:
        raise ContainerError(f"{reference}: {_words(error)}", hint="write it as repository:tag") from error


def _local(image: Any, reference: str) -> LockedImage:
    """RepoDigests is empty until an image was pushed or pulled; then only this engine's own id pins it (FACTS 4)."""
    digests = [str(digest) for digest in image.attrs.get("RepoDigests") or ()]
    repository = repository_of(reference)
    chosen = next((digest for digest in digests if digest.partition("@")[0] == repository), None)
    if chosen is None and digests:
        chosen = digests[0]
    if chosen is not None:
        return LockedImage(reference, chosen, "registry")
    return LockedImage(reference, str(image.id), "local")


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


def repository_of(reference: str) -> str:
    """`host:5000/team/image:tag@sha256:…` → `host:5000/team/image`."""
    name = reference.partition("@")[0]
    head, slash, tail = name.rpartition("/")
    return head + slash + tail.partition(":")[0]


def _words(error: BaseException) -> str:
    explanation = getattr(error, "explanation", None)
    return " ".join(str(explanation or error).split())[:300]
