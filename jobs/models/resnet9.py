"""ResNet-9 for small images: two residual blocks, three poolings; runs on a laptop's processor."""

from __future__ import annotations

from torch import Tensor, nn


def _conv(channels_in: int, channels_out: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ResNet9(nn.Module):
    """Images [B, 3, S, S] with S ≥ 16 to features [B, 8·width]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        if not 1 <= width <= 1024:
            raise TypeError(f"width must be 1 to 1024, not {width}")
        self.features = 8 * width
        self.layers = nn.Sequential(
            _conv(3, width),
            _conv(width, 2 * width, pool=True),
            _Residual(2 * width),
            _conv(2 * width, 4 * width, pool=True),
            _conv(4 * width, 8 * width, pool=True),
            _Residual(8 * width),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.layers(images_BCHW).amax(dim=(2, 3))
        return pooled
