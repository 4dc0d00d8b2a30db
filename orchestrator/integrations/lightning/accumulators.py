"""Epoch accumulators (`self.log(on_epoch=True)`, torchmetrics attributes) across a restart: Lightning saves none.

Each rank's own values are saved and restored: with rank 0's alone, the other ranks' epoch means would be wrong.
Plain types and tensors only, so that the checkpoint loads with `weights_only=True`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric

_PLAIN_METADATA = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)


def dump_accumulators(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """This rank's accumulators of the open epoch. Pure."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        "logged": {key: _dump_logged(metric) for key, metric in results.items() if _holds_values(metric)},
        "metrics": {
            name: _dump_metric(metric) for name, metric in module.named_modules() if isinstance(metric, Metric)
        },
    }


def load_accumulators(saved: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Put the accumulators back; call in on_train_start, and only when an epoch is resumed in its middle."""
    results = trainer.fit_loop.epoch_loop._results
    for key, entry in saved["logged"].items():
        results[key] = _load_logged(entry, trainer, module)
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in saved["metrics"]:
            _load_metric(metric, saved["metrics"][name])
    # else the first self.log() of the process takes itself for the first of an epoch and resets them
    trainer._logger_connector._first_loop_iter = False


def _holds_values(metric: _ResultMetric) -> bool:
    return bool(metric.meta.on_epoch and not metric.has_reset)


def _dump_logged(metric: _ResultMetric) -> dict[str, Any]:
    meta = metric.meta
    entry: dict[str, Any] = {
        "meta": {field: getattr(meta, field) for field in _PLAIN_METADATA},
        "reduce": meta.reduce_fx.__name__,
        "sync": {"should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only, "op": meta.sync.op},
        "is_tensor": metric.is_tensor,
    }
    if metric.is_tensor:
        entry["value"] = metric.value.detach().cpu().clone()
        if meta.is_mean_reduction:
            entry["batches"] = torch.as_tensor(metric.cumulated_batch_size).cpu().clone()
    return entry


def _load_logged(entry: dict[str, Any], trainer: Trainer, module: LightningModule) -> _ResultMetric:
    meta = _Metadata(**entry["meta"], reduce_fx=getattr(torch, entry["reduce"]))
    sync = entry["sync"]
    meta.sync = _Sync(
        _should=sync["should"], fn=trainer.strategy.reduce, rank_zero_only=sync["rank_zero_only"], _op=sync["op"]
    )
    metric = _ResultMetric(meta, entry["is_tensor"])
    if entry["is_tensor"]:
        metric.value = entry["value"].to(module.device)
        if meta.is_mean_reduction:
            metric.cumulated_batch_size = entry["batches"].to(module.device)
    else:
        metric.value = module.get_submodule(entry["meta"]["metric_attribute"])
    metric._update_count = 1  # torchmetrics warns about a compute() that no update() preceded
    return metric


def _dump_metric(metric: Metric) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    return {
        "states": {name: _copied(state) for name, state in states.items()},
        "updates": metric._update_count,
    }


def _copied(state: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    return [item.detach().cpu().clone() for item in state]


def _load_metric(metric: Metric, saved: dict[str, Any]) -> None:
    for name, state in saved["states"].items():
        if isinstance(state, torch.Tensor):
            setattr(metric, name, state.to(metric.device))
        else:
            setattr(metric, name, [item.to(metric.device) for item in state])
    metric._update_count = saved["updates"]
    metric._computed = None
