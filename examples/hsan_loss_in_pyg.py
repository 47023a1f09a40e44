"""HSAN's loss in a torch_geometric model: two GCN encoders, trained without labels.

    python examples/hsan_loss_in_pyg.py [DATASET] [EPOCHS]

The encoders are torch_geometric's; the loss, which compares every pair of nodes of both views
without an N x N array, is ``fastclust.nn.HardSampleInfoNCE``. Needs torch_geometric.
"""

from __future__ import annotations

import sys

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv
from torch_geometric.utils import from_scipy_sparse_matrix

import fastclust as fc


class TwoViews(torch.nn.Module):
    """Two graph convolutions with weights of their own."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self.first = GCNConv(n_features, width)
        self.second = GCNConv(n_features, width)

    def forward(self, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
        """Two embeddings [N, width] of every node."""
        return self.first(data.x, data.edge_index), self.second(data.x, data.edge_index)


def main(dataset: str = "digits", epochs: int = 60) -> dict[str, float]:
    """Train, cluster, and score against the labels, which training never sees."""
    ds = fc.load_dataset(dataset)
    features = ds.features if hasattr(ds.features, "ctypes") else ds.features.toarray()
    edge_index, _ = from_scipy_sparse_matrix(ds.adjacency)
    data = Data(x=torch.from_numpy(features), edge_index=edge_index)

    torch.manual_seed(0)
    model = TwoViews(ds.n_features, 64)
    loss_of = fc.nn.HardSampleInfoNCE(int(ds.n_clusters or 2), tau=0.9, beta=1.0)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_of.parameters()], lr=1e-3)
    for epoch in range(epochs):
        views = model(data)
        loss = loss_of(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            loss_of.refresh(*model(data))
            print(f"epoch {epoch + 1}  loss {loss.item():.4f}")
    with torch.no_grad():
        labels = loss_of.refresh(*model(data))
    scores = fc.metrics.clustering_scores(ds.labels, labels.numpy())
    print("  ".join(f"{name.upper()} {100 * value:.1f}" for name, value in scores.items()))

    # The estimators take the same Data object.
    print(fc.SSGC(n_clusters="auto").fit(data).n_clusters_, "clusters estimated by fastclust")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
