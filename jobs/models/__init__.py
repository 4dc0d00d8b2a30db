"""Backbones by name: `orch/resnet9` (built in) and `timm/<name>`. A backbone maps images to one feature vector each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from orchestrator.errors import SpecError


def build_backbone(name: str, args: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """A model with random weights, and the width of its features. Raises SpecError for unknown names or arguments."""
    family, _, model = name.partition("/")
    if family == "timm" and model:
        return _build_timm(model, args)
    if name != "orch/resnet9":
        near = difflib.get_close_matches(name, ["orch/resnet9", "timm/resnet18"], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise SpecError(f"model: there is no {name!r}", hint=f"{meant}use orch/resnet9 or timm/<a model of timm>")
    from jobs.models.resnet9 import ResNet9

    try:
        backbone = ResNet9(**args)
    except TypeError as error:
        raise SpecError(
            f"model_args: {error}", hint="orch/resnet9 takes width, the channels of its first layer"
        ) from error
    return backbone, backbone.features


def _build_timm(model: str, args: Mapping[str, Any]) -> tuple[nn.Module, int]:
    try:
        import timm  # needs torchvision; the built-in model must work without both
    except ImportError as error:
        raise SpecError(
            f"model: timm/{model} needs timm, which is not installed", hint="pip install 'orch[jobs]'"
        ) from error
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=1)
        meant = f"did you mean timm/{near[0]}?" if near else "timm.list_models() lists them"
        raise SpecError(f"model: timm has no model {model!r}", hint=meant)
    try:
        backbone = timm.create_model(model, **{"pretrained": False, **args, "num_classes": 0})
    except TypeError as error:
        raise SpecError(f"model_args: {error}", hint=f"see timm's {model}") from error
    width: Any = backbone.num_features
    return backbone, int(width)
