"""Cluster a graph of your own: a table of attributes, a list of links, no labels.

python examples/own_graph.py
"""

import numpy as np

import fastclust as fc

# Stand-ins for your data: 300 nodes with 12 attributes, and links as pairs of node numbers.
rng = np.random.default_rng(0)
community = np.repeat(np.arange(4), 75)
attributes = rng.normal(size=(300, 12)) + 1.5 * np.eye(4, 12)[community]
links = rng.integers(0, 300, size=(6000, 2))
links = links[(community[links[:, 0]] == community[links[:, 1]]) | (rng.random(6000) < 0.05)]

# Without training first: seconds, and what anything trained has to beat.
simple = fc.SSGC(n_clusters=4, random_state=0).fit(attributes, adjacency=links.T)
trained = fc.ECNMF(n_clusters=4, epochs=200, width=64, rank=8, random_state=0)
trained.fit(attributes, adjacency=links.T)

for name, model in (("SSGC", simple), ("ECN-MF", trained)):
    parts = fc.metrics.per_cluster(links.T, model.labels_)
    print(
        f"{name:8} modularity {parts['modularity'].sum():.3f}, "
        f"conductance by cluster {np.round(parts['conductance'], 2).tolist()}, "
        f"sizes {parts['nodes'].tolist()}"
    )

# Which nodes should a person look at?
margin = fc.metrics.node_margin(trained.embedding_, trained.labels_)
print("hardest nodes:", np.argsort(margin)[:5].tolist())

trained.save("own_graph_model")
assert (fc.ECNMF.load("own_graph_model").labels_ == trained.labels_).all()
