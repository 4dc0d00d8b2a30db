"""k-nearest-neighbour accuracy of frozen features: a check that needs no training (Wu et al., 2018, weighted votes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from jobs.data.images import ImageFolder

HELD_OUT = 5  # every fifth image is a query, the others are the bank
TEMPERATURE = 0.07


def knn_votes(queries_QD: Tensor, bank_MD: Tensor, labels_M: Tensor, *, neighbors: int) -> Tensor:
    """Predicted label of each query: its nearest neighbours vote by exp(cosine similarity / 0.07). Pure."""
    similarity, nearest = (queries_QD @ bank_MD.T).topk(min(neighbors, len(bank_MD)), dim=1)
    votes = torch.zeros(len(queries_QD), int(labels_M.max()) + 1, dtype=similarity.dtype)
    votes.scatter_add_(1, labels_M[nearest], (similarity / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def knn_accuracy(
    backbone: nn.Module,
    data: ImageFolder,
    *,
    neighbors: int,
    batch_size: int,
    between_batches: Callable[[], object],
) -> float:
    """Share of held-out images whose folder the others' features predict. Blocks; leaves the model's mode as it was."""
    assert data.labels is not None
    was_training = backbone.training
    backbone.eval()
    try:
        features = _features(backbone, data, batch_size, between_batches)
    finally:
        backbone.train(was_training)
    labels = torch.tensor(data.labels)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    predicted = knn_votes(features[held_out], features[~held_out], labels[~held_out], neighbors=neighbors)
    return float((predicted == labels[held_out]).double().mean())


@torch.no_grad()
def _features(backbone: nn.Module, data: ImageFolder, batch_size: int, between_batches: Callable[[], object]) -> Tensor:
    device = next(backbone.parameters()).device
    features = []
    for first in range(0, len(data), batch_size):
        between_batches()
        images = torch.stack([data[index] for index in range(first, min(first + batch_size, len(data)))])
        features.append(F.normalize(backbone(images.to(device).float() / 255).float(), dim=1).cpu())
    return torch.cat(features)
