"""Defaults of SimCLR. The learning rate is that of a global batch of 256 and scales linearly with it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

REFERENCE_BATCH = 256
DEFAULT_LR = {"sgd": 0.3, "adamw": 1e-3}
DEFAULT_WEIGHT_DECAY = {"sgd": 1e-6, "adamw": 0.05}


class SimCLRArgs(BaseModel):
    """`method_args` of SimCLR."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: Annotated[float, Field(gt=0, le=10)] = 0.2
    hidden_dim: Annotated[StrictInt, Field(ge=1, le=65536)] = 256
    output_dim: Annotated[StrictInt, Field(ge=1, le=65536)] = 64
