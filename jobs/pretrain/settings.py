"""The settings of a pretraining run: what may be set, within which range, and what is meant by a typo."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from orchestrator.errors import SpecError

Section = TypeVar("Section", bound=BaseModel)
PositiveInt = Annotated[StrictInt, Field(ge=1, le=10**9)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimSettings(_Section):
    """Overrides of the method's optimizer defaults; null = the method's."""

    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    betas: tuple[Fraction, Fraction] | None = None


class TransformSettings(_Section):
    """The two random views of an image, drawn in batch on the device."""

    image_size: Annotated[StrictInt, Field(ge=16, le=1024)] | None = None  # null = from the first image, 16 to 224
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.2
    flip: Fraction = 0.5
    jitter: Fraction = 0.8
    jitter_strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    grayscale: Fraction = 0.2
    blur: Fraction = 0.5


class CheckpointArgs(_Section):
    """When to save where `orch submit` does not say (null = not by this rule)."""

    every_steps: PositiveInt | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    every_epochs: PositiveInt | None = 1
    keep_last: PositiveInt = 3


class PretrainSettings(_Section):
    """Everything that can be set; docs/training.md explains each."""

    data: StrictStr | tuple[StrictStr, ...]
    out: StrictStr | None = None
    start_from: StrictStr | None = None
    method: Literal["simclr"] = "simclr"
    method_args: dict[str, Any] = Field(default_factory=dict)
    model: StrictStr = "orch/resnet9"
    model_args: dict[str, Any] = Field(default_factory=dict)
    epochs: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 100
    batch_size: Annotated[StrictInt, Field(ge=2, le=10**7)] = 128
    num_workers: Annotated[StrictInt, Field(ge=0, le=256)] = 2
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = 0
    optim: Literal["auto", "sgd", "adamw"] = "auto"
    optim_args: OptimSettings = OptimSettings()
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    transform_args: TransformSettings = TransformSettings()
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    deterministic: StrictBool = True
    log_every_n_steps: PositiveInt = 10
    knn_neighbors: Annotated[StrictInt, Field(ge=0, le=10_000)] = 20
    checkpoint_args: CheckpointArgs = CheckpointArgs()

    @property
    def data_paths(self) -> tuple[str, ...]:
        """`data` as a tuple."""
        return (self.data,) if isinstance(self.data, str) else self.data


def parse_settings(values: Mapping[str, Any]) -> PretrainSettings:
    """Raises SpecError that lists every problem, with what is allowed and what a misspelt key may have meant."""
    return parse_section(PretrainSettings, values)


def parse_section(model: type[Section], values: Mapping[str, Any], *, prefix: str = "") -> Section:
    """`values` as an instance of the pydantic `model`; `prefix` names the setting they come from in messages."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_sentence(model, problem, prefix) for problem in error.errors()]
    raise SpecError(
        "wrong settings:\n" + "\n".join(f"  {problem}" for problem in problems), hint="see docs/training.md"
    )


def _sentence(model: type[Any], problem: Any, prefix: str) -> str:
    place = ".".join([*([prefix] if prefix else []), *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        return f"{place}: unknown setting; {meant}"
    if problem["type"] == "missing":
        return f"{place}: is required"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]} (given: {problem['input']!r})"


def _fields_at(model: type[Any], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
