"""The random view of SimCLR: crop, flip, colour, blur; each image of a batch draws its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kornia.augmentation as K
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jobs.pretrain.settings import TransformSettings


class RandomViews:
    """uint8 images [B, 3, H, W] to one float view each [B, 3, S, S], drawn from torch's global CPU generator.

    Not a Module on purpose: as a submodule it would follow `.to(device)` and `.to(dtype)`, and kornia would then draw
    its parameters there, so that the same seed gave other views.
    """

    def __init__(self, settings: TransformSettings, *, image_size: int) -> None:
        strength = settings.jitter_strength
        kernel = max(3, image_size // 10 | 1)  # about a tenth of the image, odd
        parts = (
            K.RandomResizedCrop((image_size, image_size), scale=(settings.min_scale, 1.0)),
            K.RandomHorizontalFlip(p=settings.flip),
            K.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=settings.jitter),
            K.RandomGrayscale(p=settings.grayscale),
            K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=settings.blur),
        )
        for part in parts:
            part.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
        self._augment = torch.nn.Sequential(*parts)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        view: Tensor = self._augment(images_BCHW.float() / 255)
        return view
