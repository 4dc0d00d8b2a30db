"""`python -m jobs.data.digits --out DIR`: scikit-learn's 1 797 scanned digits as PNG files in ten class folders.

Real images without a network (UCI Optical Recognition of Handwritten Digits, 8x8 pixels, 16 grey levels).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 16  # each pixel becomes two by two: the smallest size the models take
COMPLETE = "COMPLETE"  # written last


def write_digits(out: Path, *, limit: int | None = None) -> int:
    """Write the images below `out` and return their number. Idempotent; `out` appears complete or not at all.

    Args:
        limit: only the first so many (the classes take turns in the data set).
    """
    count = _digits_there(out)
    if count is not None:
        return count
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and was not written by this command; choose another folder")
    images, labels = _load(limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            folder = staging / str(label)
            folder.mkdir(exist_ok=True)
            _image(pixels).save(folder / f"{index:04d}.png")
        (staging / COMPLETE).write_text(f"{len(images)}\n")
        staging.chmod(0o755)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already unless something failed or another process was faster
    return len(images)


def _digits_there(out: Path) -> int | None:
    try:
        return int((out / COMPLETE).read_text())
    except FileNotFoundError:
        return None


def _load(limit: int | None) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits  # only to write the files: training does not need scikit-learn

    digits = load_digits()
    return digits.images[:limit], digits.target[:limit]


def _image(pixels: Any) -> Image.Image:
    grey = Image.new("L", (8, 8))
    grey.putdata([min(255, int(value) * 16) for row in pixels for value in row])
    return grey.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _publish(staging: Path, out: Path) -> None:
    try:
        staging.replace(out)  # an empty directory may be in the way; a full one is another process's finished work
    except OSError:
        if _digits_there(out) is None:
            raise


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.data.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; left alone when complete")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many images")
    options = parser.parse_args(argv)
    try:
        count = write_digits(options.out, limit=options.limit)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} images in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
