"""The estimators as scikit-learn and users see them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastclust as fc
from fastclust.presets import PRESETS
from fastclust.validation import DataWarning

QUICK: dict[str, Any] = {
    "hsan": lambda k=2, **kw: fc.HSAN(k, **{"epochs": 3, "width": 8, "n_init": 2, **kw}),
    "ecnmf": lambda k=2, **kw: fc.ECNMF(k, **{"epochs": 3, "width": 8, "n_init": 2, **kw}),
    "ssgc": lambda k=2, **kw: fc.SSGC(k, **{"n_init": 2, **kw}),
}
every_model = pytest.mark.parametrize("model", sorted(QUICK))
trained_model = pytest.mark.parametrize("model", ["ecnmf", "hsan"])


@pytest.mark.filterwarnings("ignore:n_clusters should be at least 2")
@parametrize_with_checks([fc.HSAN(epochs=3, width=16), fc.ECNMF(epochs=3, width=16), fc.SSGC()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@every_model
def test_two_blocks_are_found(model, two_blocks):
    adjacency, x, labels = two_blocks
    estimator = QUICK[model]().fit(x, adjacency=adjacency)
    assert fc.metrics.clustering_scores(labels, estimator.labels_)["acc"] > 0.9
    assert estimator.labels_.dtype == np.int64
    assert estimator.labels_.shape == (60,)
    assert estimator.embedding_.shape[0] == 60
    assert estimator.embedding_.dtype == np.float32
    assert estimator.n_features_in_ == 8
    assert estimator.n_iter_ == (0 if model == "ssgc" else 3)
    assert len(estimator.history_) == estimator.n_iter_
    predicted = QUICK[model]().fit_predict(x, adjacency=adjacency)
    assert np.array_equal(predicted, estimator.labels_)


@every_model
def test_y_is_never_read(model, two_blocks):
    adjacency, x, labels = two_blocks

    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"y.{name} was read")

    plain = QUICK[model]().fit(x, adjacency=adjacency)
    for y in (labels, 1 - labels, Untouchable()):
        assert np.array_equal(QUICK[model]().fit(x, y, adjacency=adjacency).labels_, plain.labels_)


@every_model
def test_every_kind_of_input_gives_the_same_clusters(model, two_blocks):
    adjacency, x, _ = two_blocks
    coo = adjacency.tocoo()
    edge_index = np.stack([coo.row, coo.col]).astype(np.int64)
    graphs = [
        adjacency,
        sp.csr_matrix(adjacency),
        adjacency.toarray(),
        torch.from_numpy(adjacency.toarray()),
        torch.from_numpy(adjacency.toarray()).to_sparse(),
        edge_index,
        torch.from_numpy(edge_index),
        nx.from_scipy_sparse_array(adjacency),
    ]
    expected = QUICK[model]().fit(x, adjacency=adjacency).labels_
    for graph in graphs:
        assert np.array_equal(QUICK[model]().fit(x, adjacency=graph).labels_, expected)
    for features in (torch.from_numpy(x), x.astype(np.float64), np.asfortranarray(x)):
        assert np.array_equal(QUICK[model]().fit(features, adjacency=adjacency).labels_, expected)
    data = SimpleNamespace(
        x=torch.from_numpy(x), edge_index=torch.from_numpy(edge_index), y=None, num_nodes=60
    )
    fitted = QUICK[model]().fit(data)
    assert np.array_equal(fitted.labels_, expected)
    assert fitted.n_features_in_ == 8
    with pytest.raises(ValueError, match="adjacency must be None where X brings its own graph"):
        QUICK[model]().fit(data, adjacency=adjacency)


@every_model
def test_sparse_and_dense_attributes_agree(model, two_blocks):
    adjacency, _, labels = two_blocks
    thin = np.zeros((60, 100), np.float32)
    thin[np.arange(60), labels * 50 + np.arange(60) % 7] = 1.0
    dense = QUICK[model]().fit(thin, adjacency=adjacency).labels_
    sparse = QUICK[model]().fit(sp.csr_array(thin), adjacency=adjacency).labels_
    assert fc.metrics.clustering_scores(dense, sparse)["ari"] > 0.9


@every_model
def test_runs_repeat_and_seeds_matter(model, two_blocks):
    adjacency, x, _ = two_blocks
    torch.manual_seed(1)
    a = QUICK[model]().fit(x, adjacency=adjacency)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = QUICK[model]().fit(x, adjacency=adjacency)
    assert a.embedding_.tobytes() == b.embedding_.tobytes()
    assert torch.equal(torch.get_rng_state(), before)  # global streams are left alone
    assert np.array_equal(np.random.get_state()[1], state[1])
    if model != "ssgc":
        c = QUICK[model](random_state=7).fit(x, adjacency=adjacency)
        assert a.embedding_.tobytes() != c.embedding_.tobytes()
        QUICK[model](random_state=np.random.RandomState(0)).fit(x, adjacency=adjacency)


@every_model
def test_save_and_load(model, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    fitted = QUICK[model](random_state=3).fit(x, adjacency=adjacency)
    fitted.save(tmp_path / "model")
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert names == {"model.safetensors", "config.json"}
    loaded = type(fitted).load(tmp_path / "model")
    assert loaded.get_params() == fitted.get_params()
    assert np.array_equal(loaded.labels_, fitted.labels_)
    assert loaded.embedding_.tobytes() == fitted.embedding_.tobytes()
    assert loaded.history_ == fitted.history_
    assert loaded.n_features_in_ == 8
    assert loaded.parameters_.keys() == fitted.parameters_.keys()
    other = fc.SSGC if model != "ssgc" else fc.HSAN
    with pytest.raises(ValueError, match=f"it holds a {type(fitted).__name__}"):
        other.load(tmp_path / "model")
    with pytest.raises(ValueError, match="directory must hold"):
        type(fitted).load(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="directory must hold"):
        type(fitted).load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["fastclust"]


@pytest.mark.parametrize("name", sorted(PRESETS["hsan"]))
def test_presets_fit_the_constructors(name):
    for cls, key in ((fc.HSAN, "hsan"), (fc.ECNMF, "ecnmf"), (fc.SSGC, "ssgc")):
        estimator = cls.for_dataset(name, random_state=4)
        assert estimator.random_state == 4
        for keyword, value in PRESETS[key][name].items():
            if not (cls is fc.HSAN and keyword == "lr"):
                assert getattr(estimator, keyword) == value
        clone(estimator)
    # the published rate belongs to the published training rule
    if "lr" in PRESETS["hsan"][name]:
        published = fc.HSAN.for_dataset(name, protocol="paper-code")
        assert published.lr == PRESETS["hsan"][name]["lr"]
    assert fc.HSAN.for_dataset(name).lr is None
    assert fc.HSAN.for_dataset(name, lr=0.5).lr == 0.5


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"dataset must be one of .*cora.*, got 'nosuch'"):
        fc.ECNMF.for_dataset("nosuch")


@trained_model
@pytest.mark.parametrize("protocol", ["standard", "paper-code"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3", "bf16"])
def test_protocols_and_precisions_run(model, protocol, precision, two_blocks):
    adjacency, x, _ = two_blocks
    estimator = QUICK[model](protocol=protocol, precision=precision)
    estimator.fit(x, adjacency=adjacency)
    assert np.isfinite(estimator.embedding_).all()


@pytest.mark.parametrize("recombine", ["merge", "block", "per_batch", "literal"])
@pytest.mark.parametrize("add_mean", [False, True])
def test_ecnmf_takes_every_recombination(recombine, add_mean, two_blocks):
    adjacency, x, _ = two_blocks
    estimator = QUICK["ecnmf"](recombine=recombine, batch_size=16, rank=3, add_mean=add_mean)
    assert np.isfinite(estimator.fit(x, adjacency=adjacency).embedding_).all()


# --- unusual and bad input -----------------------------------------------------------------------


@every_model
def test_unusual_but_usable_data(model, two_blocks):
    adjacency, x, _ = two_blocks
    for warned, graph in (
        (False, sp.csr_array((60, 60), dtype=np.float32)),  # every node isolated
        (False, sp.csr_array(sp.block_diag([np.ones((30, 30)) - np.eye(30)] * 2))),  # disconnected
        (False, adjacency * 2.5),  # weighted
        (True, sp.csr_array(sp.triu(adjacency))),  # asymmetric
        (True, adjacency + sp.eye_array(60, dtype=np.float32)),  # self loops
    ):
        if warned:
            with pytest.warns(DataWarning):
                estimator = QUICK[model]().fit(x, adjacency=graph)
        else:
            estimator = QUICK[model]().fit(x, adjacency=graph)
        assert np.isfinite(estimator.embedding_).all()
    rows = x.copy()
    rows[:5] = 0  # all-zero rows
    assert np.isfinite(QUICK[model]().fit(rows, adjacency=adjacency).embedding_).all()
    same = np.ones_like(x)  # constant attributes
    assert np.isfinite(QUICK[model]().fit(same, adjacency=adjacency).embedding_).all()
    with pytest.warns(DataWarning, match="n_clusters should be at least 2, got 1"):
        assert not QUICK[model](1).fit(x, adjacency=adjacency).labels_.any()
    tiny = QUICK[model]().fit(x[:2], adjacency=adjacency[:2][:, :2])  # N = K = 2
    assert tiny.labels_.shape == (2,)


@every_model
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"n_clusters": 0}, ValueError, "n_clusters must be at least 1, got 0"),
        ({"n_clusters": 61}, ValueError, "n_clusters must be at most the number of nodes"),
        ({"n_clusters": 2.5}, TypeError, "n_clusters must be an integer, got 2.5"),
        ({"n_init": 0}, ValueError, "n_init"),
        ({"device": "abacus"}, ValueError, "device must be 'auto', 'cpu' or 'cuda'"),
        ({"random_state": "x"}, ValueError, "random_state"),
    ],
)
def test_bad_settings(model, keywords, error, message, two_blocks):
    adjacency, x, _ = two_blocks
    with pytest.raises(error, match=message):
        QUICK[model]().set_params(**keywords).fit(x, adjacency=adjacency)


@trained_model
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("epochs", 0),
        ("lr", -1.0),
        ("tau", -0.1),
        ("width", 0),
        ("protocol", "paper"),
        ("selection", "oracle"),
        ("precision", "fp8"),
        ("checkpoint_every", 0),
        ("optimizer", "sgd"),
    ],
)
def test_bad_training_settings(model, keyword, value, two_blocks):
    adjacency, x, _ = two_blocks
    with pytest.raises(ValueError, match=keyword):
        QUICK[model]().set_params(**{keyword: value}).fit(x, adjacency=adjacency)


def test_sizes_that_the_data_do_not_allow(two_blocks):
    adjacency, x, _ = two_blocks
    for rank, batch in ((9, None), (8, 5)):
        with pytest.raises(ValueError, match="rank must be at most"):
            QUICK["ecnmf"](rank=rank, batch_size=batch).fit(x, adjacency=adjacency)
    with pytest.raises(ValueError, match="n_input must be at most min"):
        QUICK["hsan"](n_input=9).fit(x, adjacency=adjacency)
    with pytest.raises(ValueError, match="n_components must be at most"):
        QUICK["ssgc"](n_components=9).fit(x, adjacency=adjacency)


@every_model
def test_bad_data(model, two_blocks):
    adjacency, x, _ = two_blocks
    nan = x.copy()
    nan[3, 2] = np.nan
    infinite = x.copy()
    infinite[0, 0] = np.inf
    for bad, message in (
        (nan, "X must hold finite values.*NaN at row 3"),
        (infinite, "X must hold finite values"),
        (x[:, :0], "X must have at least one column"),
        (x[0], "2"),
    ):
        with pytest.raises(ValueError, match=message):
            QUICK[model]().fit(bad, adjacency=adjacency)
    with pytest.raises(ValueError):
        QUICK[model]().fit(x[:-1], adjacency=adjacency)
    with pytest.raises(ValueError, match="n_samples=1"):
        QUICK[model]().fit(x[:1], adjacency=adjacency[:1][:, :1])
    for bad_graph in (
        adjacency[:-1],
        np.array([[0, 60], [1, 2]]),
        np.array([[0, -1], [1, 2]]),
        adjacency * np.float32("nan"),
        adjacency * -1,
    ):
        with pytest.raises(ValueError, match="adjacency"):
            QUICK[model]().fit(x, adjacency=bad_graph)


def test_cuda_where_there_is_none(two_blocks):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    adjacency, x, _ = two_blocks
    with pytest.raises(ValueError, match="device must be one that is there, got 'cuda'"):
        QUICK["hsan"](device="cuda").fit(x, adjacency=adjacency)


# --- real graphs ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_few_epochs_on_cora(data_root):
    ds = fc.load_dataset("cora", root=data_root)
    ecnmf = fc.ECNMF.for_dataset("cora", epochs=12, lr=1e-3, n_init=3)
    hsan = fc.HSAN.for_dataset("cora", epochs=4, width=64, n_init=3)
    # k-means on the attributes scores 35
    for estimator, least in ((ecnmf, 0.60), (hsan, 0.45), (fc.SSGC(7), 0.60)):
        estimator.fit(ds.features, adjacency=ds.adjacency)
        acc = fc.metrics.clustering_scores(ds.labels, estimator.labels_)["acc"]
        assert acc > least, type(estimator).__name__


@trained_model
def test_few_epochs_on_digits(model):
    ds = fc.load_dataset("digits")
    estimator = QUICK[model](10, width=64).fit(ds.features, adjacency=ds.adjacency)
    assert fc.metrics.clustering_scores(ds.labels, estimator.labels_)["acc"] > 0.5
