"""The operators in a training loop of your own: contrastive learning with hard-sample weights.

A linear encoder per view, HSAN's loss over all 2N x 2N pairs without ever storing them, k-means at
the end. Nothing of fastclust's models or training is used.

    python examples/own_training_loop.py
"""

import torch
from torch.nn.functional import normalize

import fastclust as fc
from fastclust import ops

data = fc.load_dataset("digits")
graph = fc.Graph(data.adjacency, norm="sym")
x = ops.propagate(graph, torch.as_tensor(data.features), steps=2)  # [N, D], smoothed attributes

torch.manual_seed(0)
encoders = torch.nn.ModuleList(torch.nn.Linear(x.shape[1], 64) for _ in range(2))
optimizer = torch.optim.Adam(encoders.parameters(), lr=1e-3)
one = torch.tensor(1.0)  # no structure view: all similarity is that of the attributes
weights = None

for epoch in range(40):
    z = normalize(torch.cat([encoder(x) for encoder in encoders]))  # [2N, 64], view 1 above view 2
    loss = ops.hard_infonce(z, None, one, weights=weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if epoch % 10 == 0:  # which pairs are hard? judged by the clusters of now
        with torch.no_grad():
            first, second = z.chunk(2)
            clusters = ops.kmeans((first + second) / 2, 10, seed=epoch).labels
            confident = torch.ones(len(clusters), dtype=torch.bool)
            weights = ops.hardness(z, None, one, clusters, confident, 1.0)
        print(f"epoch {epoch:2}  loss {loss.item():.4f}")

with torch.no_grad():
    embedding = (normalize(encoders[0](x)) + normalize(encoders[1](x))) / 2
labels = ops.kmeans(embedding, 10, n_init=10).labels
print(fc.metrics.clustering_scores(data.labels, labels.numpy()))
