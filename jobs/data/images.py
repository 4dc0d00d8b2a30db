"""Images in folders, in an order that does not depend on the machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from orchestrator.errors import SpecError

log = logging.getLogger("jobs.data")

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class ImageFolder(torch.utils.data.Dataset[Tensor]):
    """uint8 images [3, S, S] of all image files below the given folders, sorted by their relative names.

    An image's label is the name of the folder it lies in; `labels` is None unless there are at least two such folders.
    Nothing here is random, so the `(index, epoch)` keys of the exact sampler need no seeding.
    """

    takes_epoch_keys = True

    def __init__(self, paths: Sequence[str], *, image_size: int | None = None) -> None:
        """Raises SpecError when a path does not exist or holds no image."""
        listed = [entry for path in paths for entry in _list_images(Path(path))]
        empty = [path for path, _name in listed if path.stat().st_size == 0]
        if empty:
            log.warning("%d empty files are left out, for example %s", len(empty), empty[0])
        skipped = frozenset(empty)
        kept = [entry for entry in listed if entry[0] not in skipped]
        if not kept:
            raise SpecError(
                f"data: no images below {', '.join(paths)}", hint=f"looked for {', '.join(sorted(SUFFIXES))}"
            )
        self.files = [path for path, _name in kept]
        self.names = [name for _path, name in kept]
        self.labels = _labels(self.files)
        self.image_size = image_size or _natural_size(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        index = key[0] if isinstance(key, tuple) else key
        return _load_square(self.files[index], self.image_size)


def _list_images(root: Path) -> list[tuple[Path, str]]:
    """(file, name relative to `root`), sorted by name; a file stands for itself."""
    if root.is_file():
        return [(root, root.name)]
    if not root.is_dir():
        raise SpecError(f"data: {root} does not exist", hint="inside a container, paths are those of its mounts")
    found = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(((path, path.relative_to(root).as_posix()) for path in found), key=lambda entry: entry[1])


def _labels(files: Sequence[Path]) -> list[int] | None:
    folders = sorted({path.parent.name for path in files})
    number = {name: index for index, name in enumerate(folders)}
    return [number[path.parent.name] for path in files] if len(folders) > 1 else None


def _natural_size(path: Path) -> int:
    """The next multiple of 16 at the first image's longer side, at most 224."""
    with _open(path) as image:
        side = max(image.size)
    return min(224, (side + 15) // 16 * 16)


def _load_square(path: Path, size: int) -> Tensor:
    """The middle square of an image, scaled to `size` pixels."""
    with _open(path) as image:
        try:
            rgb = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow raises the latter for a broken PNG chunk
            raise SpecError(f"data: cannot decode {path}: {error}", hint="replace or remove this file") from error
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, 3).permute(2, 0, 1).contiguous()


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise SpecError(f"data: cannot read {path}: {error}", hint="replace or remove this file") from error
