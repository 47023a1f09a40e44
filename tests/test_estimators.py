"""The estimators as scikit-learn and users see them."""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastclust as fc
from fastclust.callbacks import TensorBoard
from fastclust.models import n_clusters
from fastclust.models.n_clusters import estimate_n_clusters
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


class Foreign:
    """An array of another library, as far as its consumers see one: it speaks DLPack only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_tables_and_foreign_arrays(two_blocks):
    pd = pytest.importorskip("pandas")
    adjacency, x, _ = two_blocks
    names = [f"node-{i}" for i in range(60)]
    table = pd.DataFrame(x, index=names, columns=[f"c{j}" for j in range(8)])
    graph = pd.DataFrame(adjacency.toarray(), index=names, columns=names)
    shuffled = np.random.default_rng(0).permutation(60)
    expected = QUICK["ecnmf"]().fit(x, adjacency=adjacency)
    for graph_like in (graph, graph.iloc[shuffled], graph.iloc[shuffled, shuffled[::-1]]):
        fitted = QUICK["ecnmf"]().fit(table, adjacency=graph_like)
        assert fitted.embedding_.tobytes() == expected.embedding_.tobytes()
    assert list(fitted.feature_names_in_) == list(table.columns)
    # as do the nodes of a networkx graph, which come in the order of the edges
    linked = nx.from_pandas_adjacency(graph.iloc[shuffled, shuffled])
    fitted = QUICK["ecnmf"]().fit(table, adjacency=linked)
    assert fitted.embedding_.tobytes() == expected.embedding_.tobytes()
    numbers = nx.from_scipy_sparse_array(adjacency)
    fitted = QUICK["ecnmf"]().fit(pd.DataFrame(x).iloc[shuffled], adjacency=numbers)
    assert np.array_equal(
        fitted.labels_,
        QUICK["ecnmf"]().fit(x[shuffled], adjacency=adjacency[shuffled][:, shuffled]).labels_,
    )
    twice = pd.concat([table, table.iloc[:5]])
    with pytest.raises(ValueError, match=r"per row of the features \(65\), got shape \(60, 60\)"):
        QUICK["ecnmf"]().fit(twice, adjacency=graph)
    # names that the table of attributes does not know say nothing about order
    numbered = QUICK["ecnmf"]().fit(pd.DataFrame(x), adjacency=graph)
    assert np.array_equal(numbered.labels_, expected.labels_)
    sparse = table.astype(pd.SparseDtype("float32", 0))
    assert np.array_equal(QUICK["ecnmf"]().fit(sparse, adjacency=graph).labels_, expected.labels_)
    foreign = QUICK["ecnmf"]().fit(Foreign(x), adjacency=Foreign(adjacency.toarray()))
    assert foreign.embedding_.tobytes() == expected.embedding_.tobytes()


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


@trained_model
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_numpy_numbers_as_settings(model, dtype, two_blocks, tmp_path):
    """A search over np.arange gives such: the checkpoint failed after the epochs it was to keep."""
    adjacency, x, _ = two_blocks
    plain = QUICK[model]().fit(x, adjacency=adjacency)
    fitted = QUICK[model](
        epochs=dtype(3),
        width=dtype(8),
        eval_every=dtype(10),
        checkpoint_dir=tmp_path,
        checkpoint_every=dtype(1),
    )
    fitted.fit(x, adjacency=adjacency)
    assert np.array_equal(fitted.labels_, plain.labels_)
    assert type(fitted.n_iter_) is int
    resumed = QUICK[model](checkpoint_dir=tmp_path, resume=True).fit(x, adjacency=adjacency)
    assert np.array_equal(resumed.labels_, plain.labels_)


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
    # the disk was full, or the power out, between the two files of a later save
    QUICK[model](random_state=4).fit(x, adjacency=adjacency).save(tmp_path / "later")
    (tmp_path / "later" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"of another save than config\.json"):
        type(fitted).load(tmp_path / "model")
    fitted.save(tmp_path / "model")
    type(fitted).load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="directory must hold"):
        type(fitted).load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["fastclust"]


@trained_model
def test_a_loaded_estimator_leaves_the_run_that_it_came_from_alone(model, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    keep = {"checkpoint_dir": tmp_path / "checkpoint", "resume": True}
    fitted = QUICK[model](**keep).fit(x, adjacency=adjacency)
    fitted.save(tmp_path)
    old = {path.name: path.read_bytes() for path in keep["checkpoint_dir"].iterdir()}
    loaded = type(fitted).load(tmp_path)
    assert (loaded.checkpoint_dir, loaded.resume) == (None, False)
    loaded.fit(x[::-1], adjacency=adjacency)
    assert {path.name: path.read_bytes() for path in keep["checkpoint_dir"].iterdir()} == old


@every_model
def test_pickles_from_before_every_method_had_a_module_of_its_own(model, two_blocks):
    adjacency, x, _ = two_blocks
    fitted = QUICK[model]().fit(x, adjacency=adjacency)
    name = type(fitted).__name__.encode()
    now = b"c" + type(fitted).__module__.encode() + b"\n" + name
    then = b"cfastclust.estimators\n" + name
    text = pickle.dumps(fitted, protocol=0)
    assert now in text
    old = pickle.loads(text.replace(now, then))
    assert np.array_equal(old.predict(x, adjacency=adjacency), fitted.labels_)


@pytest.mark.filterwarnings("ignore:n_clusters should be at least 2")
def test_saved_settings_are_json_and_files_are_readable_by_others(two_blocks, tmp_path):
    """One cluster has an infinite Davies-Bouldin score, for which JSON has no word."""
    adjacency, x, _ = two_blocks
    fitted = QUICK["hsan"](1, eval_every=1).fit(x, adjacency=adjacency)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    old = os.umask(0o022)
    try:
        fitted.save(tmp_path)
    finally:
        os.umask(old)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


def test_rank_fits_a_batch(two_blocks):
    """60 rows in batches of 25; that the last has ten limits nothing."""
    adjacency, x, _ = two_blocks
    x = np.random.default_rng(0).standard_normal((60, 30)).astype(np.float32)
    fitted = QUICK["ecnmf"](batch_size=25).fit(x, adjacency=adjacency)
    assert fitted.resolved_["rank"] == 25
    with pytest.raises(ValueError, match=r"rows of a batch \(25\)"):
        QUICK["ecnmf"](batch_size=25, rank=26).fit(x, adjacency=adjacency)


@trained_model
def test_checkpoint_interval_is_checked_without_a_folder(model, two_blocks):
    adjacency, x, _ = two_blocks
    with pytest.raises(ValueError, match="checkpoint_every must be"):
        QUICK[model](checkpoint_every="5m").fit(x, adjacency=adjacency)


# --- new nodes, copies, number of clusters --------------------------------------------------------


@every_model
def test_the_training_graph_is_predicted_as_it_was_clustered(model, two_blocks, tmp_path):
    adjacency, x, _ = two_blocks
    fitted = QUICK[model]().fit(x, adjacency=adjacency)
    assert np.array_equal(fitted.predict(x, adjacency=adjacency), fitted.labels_)
    embedding = fitted.transform(x, adjacency=adjacency)
    np.testing.assert_allclose(embedding, fitted.embedding_, atol=1e-4)
    assert fitted.get_feature_names_out().shape == (embedding.shape[1],)
    fitted.save(tmp_path)
    for copy in (type(fitted).load(tmp_path), pickle.loads(pickle.dumps(fitted))):
        assert copy.transform(x, adjacency=adjacency).tobytes() == embedding.tobytes()
        assert np.array_equal(copy.predict(x, adjacency=adjacency), fitted.labels_)


@pytest.mark.parametrize(
    ("model", "keywords"),
    [
        ("hsan", {"n_input": 4}),
        ("hsan", {"selection": "loss", "eval_every": 1, "activation": "sigmoid"}),
        ("ecnmf", {"rank": 4, "add_mean": True, "epochs": 40, "lr": 1e-3}),
        ("ecnmf", {"rank": 4, "batch_size": 20, "norm": "sym"}),
        ("ssgc", {"recipe": "plain", "n_components": 4}),
    ],
)
def test_nodes_that_join_the_graph(model, keywords, two_blocks):
    adjacency, x, _ = two_blocks
    old = np.r_[0:25, 30:55]  # five nodes of each block come later
    fitted = QUICK[model](**keywords).fit(x[old], adjacency=adjacency[old][:, old])
    grown = fitted.predict(x, adjacency=adjacency)
    assert (grown[old] == fitted.labels_).mean() > 0.9
    new = np.r_[25:30, 55:60]
    whole = QUICK[model](**keywords).fit(x, adjacency=adjacency).labels_
    assert fc.metrics.clustering_scores(whole[new], grown[new])["acc"] > 0.8
    sparse = fitted.predict(sp.csr_array(x), adjacency=adjacency)
    assert np.array_equal(sparse, grown)
    # without edges every node is judged alone
    alone = fitted.transform(x)
    np.testing.assert_allclose(fitted.transform(x[7:9]), alone[7:9], atol=1e-5)
    with pytest.raises(ValueError, match=r"X has 7 features, but .* is expecting 8"):
        fitted.predict(x[:, :7], adjacency=adjacency)


def test_prediction_where_the_method_defines_none(two_blocks):
    adjacency, x, _ = two_blocks
    batches = QUICK["ecnmf"](rank=3, batch_size=20, recombine="block").fit(x, adjacency=adjacency)
    with pytest.raises(ValueError, match="recombine='merge' or batch_size=None"):
        batches.predict(x, adjacency=adjacency)
    degree = adjacency.sum(axis=1).astype(int)
    one_hot = sp.csr_array(np.eye(degree.max() + 1, dtype=np.float32)[degree])
    ranks = QUICK["ssgc"]().fit(one_hot, adjacency=adjacency)
    assert ranks.recipe_ == "degree"
    with pytest.raises(ValueError, match="only encode degrees"):
        ranks.transform(one_hot, adjacency=adjacency)


@every_model
def test_copies_and_pipelines(model, two_blocks):
    adjacency, x, _ = two_blocks
    estimator = QUICK[model](random_state=np.random.RandomState(3), n_init=3)
    twin = clone(estimator)
    assert twin is not estimator and not hasattr(twin, "labels_")
    assert {**twin.get_params(), "random_state": 0} == {**estimator.get_params(), "random_state": 0}
    assert estimator.set_params(n_init=2).n_init == 2
    pipe = make_pipeline(StandardScaler(), QUICK[model]())
    name = pipe.steps[-1][0]
    labels = pipe.fit_predict(x, **{f"{name}__adjacency": adjacency})
    direct = QUICK[model]().fit(StandardScaler().fit_transform(x), adjacency=adjacency)
    assert np.array_equal(labels, direct.labels_)
    assert np.array_equal(pipe.predict(x, adjacency=adjacency), labels)
    # a random state gives one seed, which the files keep
    first = QUICK[model](random_state=np.random.RandomState(5)).fit(x, adjacency=adjacency)
    second = QUICK[model](random_state=np.random.RandomState(5)).fit(x, adjacency=adjacency)
    assert first.seed_ == second.seed_
    assert first.embedding_.tobytes() == second.embedding_.tobytes()


def planted(k: int, seed: int) -> tuple[sp.csr_array, np.ndarray]:
    """K blocks of 60 nodes: adjacency and attributes [60 K, 16]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(k), 60)
    p = np.where(labels[:, None] == labels, 0.15, 0.01)
    upper = np.triu(rng.random((60 * k, 60 * k)) < p, 1)
    x = rng.normal(size=(60 * k, 16)) + rng.normal(size=(k, 16))[labels]
    return sp.csr_array((upper | upper.T).astype(np.float32)), x.astype(np.float32)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_the_number_of_planted_blocks_is_found(k):
    adjacency, x = planted(k, seed=k)
    found, evidence = estimate_n_clusters(x, adjacency)
    assert found == k
    assert evidence["n_clusters"][0] == 2 and len(evidence["agreement"]) > k - 1
    best = max(evidence["agreement"])
    assert evidence["agreement"][k - 2] >= 0.95 * best > 0.4


def test_a_number_of_clusters_that_is_a_guess_is_told():
    adjacency, x = planted(3, seed=3)
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    shuffled = adjacency[np.random.default_rng(1).permutation(180)]
    with pytest.warns(DataWarning, match=r"agreement 0.0\d at best\): \d+ is a guess; give n_clus"):
        estimate_n_clusters(noise, shuffled.maximum(shuffled.T))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_n_clusters(x, adjacency)


def test_the_number_of_clusters_of_many_nodes_is_that_of_a_sample(monkeypatch):
    """k-means of all nodes, 1000 times, took 20 minutes of 200,000 that SSGC clusters in 4 s."""
    planted = fc.make_attributed_sbm(3000, 15000, 16, 5, homophily=0.9, feature_noise=0.3)
    rows = []
    plain = n_clusters.ops.kmeans
    monkeypatch.setattr(
        n_clusters.ops, "kmeans", lambda x, *a, **kw: (rows.append(len(x)), plain(x, *a, **kw))[1]
    )
    monkeypatch.setattr(n_clusters, "SAMPLED_FROM", 1000)
    monkeypatch.setattr(n_clusters, "AGREEMENT_ROWS", 500)
    assert estimate_n_clusters(planted.features, planted.adjacency)[0] == 5
    assert set(rows) == {500}


def test_halves_that_do_not_split_do_not_agree(two_blocks):
    """Two clusterings into one cluster are equal, which says nothing about their number."""
    adjacency, _, _ = two_blocks
    with pytest.warns(DataWarning, match="found no number of clusters that two halves"):
        _, evidence = estimate_n_clusters(np.ones((60, 8), np.float32), adjacency)
    assert max(evidence["agreement"]) == 0


@every_model
def test_clusters_that_fall_into_one_are_told(model, two_blocks):
    adjacency, x, _ = two_blocks
    with pytest.warns(DataWarning, match="all nodes are in one of the 2 clusters asked for"):
        fitted = QUICK[model]().fit(np.zeros_like(x), adjacency=adjacency)
    assert len(np.unique(fitted.labels_)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QUICK[model]().fit(x, adjacency=adjacency)


@every_model
def test_auto_clusters(model, tmp_path):
    adjacency, x = planted(3, seed=3)
    fitted = QUICK[model]("auto").fit(x, adjacency=adjacency)
    assert fitted.n_clusters_ == fitted.resolved_["n_clusters"] == 3
    assert np.unique(fitted.labels_).size == 3
    assert fitted.n_clusters == "auto"
    fitted.save(tmp_path)
    assert type(fitted).load(tmp_path).n_clusters_evidence_ == fitted.n_clusters_evidence_
    with pytest.raises(ValueError, match="at least 2 attributes"):
        QUICK[model]("auto").fit(x[:, :1], adjacency=adjacency)
    with pytest.raises(TypeError, match="n_clusters must be an integer"):
        QUICK[model]("many").fit(x, adjacency=adjacency)


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


@pytest.mark.parametrize("name", ["Cora", " CORA\n"])
def test_presets_go_by_the_names_that_data_sets_are_loaded_by(name):
    for cls in (fc.HSAN, fc.ECNMF, fc.SSGC):
        assert cls.for_dataset(name).get_params() == cls.for_dataset("cora").get_params()


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


def test_callbacks(two_blocks):
    adjacency, x, _ = two_blocks
    first: list[int] = []
    second: list[int] = []
    both = [lambda event: first.append(event.epoch), lambda event: second.append(event.epoch)]
    QUICK["hsan"](callbacks=both).fit(x, adjacency=adjacency)
    assert first == second == [1, 2, 3]
    assert QUICK["hsan"](callbacks=first.append).fit(x, adjacency=adjacency)  # one callable
    assert len(first) == 6


def test_tensorboard_holds_the_history(two_blocks, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    adjacency, x, _ = two_blocks
    watched = QUICK["hsan"](callbacks=TensorBoard(tmp_path)).fit(x, adjacency=adjacency)
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [scalar.value for scalar in events.Scalars("loss")]
    np.testing.assert_allclose(losses, [row["loss"] for row in watched.history_], rtol=1e-6)
    assert len(events.Scalars("modularity")) == 2  # evaluated epochs


def test_estimators_with_tensorboard_are_copied(two_blocks, tmp_path):
    """A search clones its estimator before every fit."""
    pytest.importorskip("tensorboard")
    adjacency, x, _ = two_blocks
    watched = QUICK["hsan"](callbacks=TensorBoard(tmp_path)).fit(x, adjacency=adjacency)
    for copy in (clone(watched), pickle.loads(pickle.dumps(watched))):
        before = len(list(tmp_path.iterdir()))
        copy.fit(x, adjacency=adjacency)
        assert len(list(tmp_path.iterdir())) == before + 1


def test_missing_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'fastclust\[tensorboard\]'"):
        TensorBoard(tmp_path)


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
    with pytest.raises(ValueError, match="device must be one that can be used, got 'cuda'"):
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


def test_open_settings_follow_the_attributes_and_the_protocol(two_blocks, degrees_only) -> None:
    """The data settle ECN-MF's propagation; the protocol HSAN's weights and epochs."""
    adjacency, x, _ = two_blocks
    quick: Any = {"epochs": 1, "width": 8, "n_init": 2}

    def resolved(model: Any, graph: Any = adjacency, features: Any = x, **kw: Any) -> Any:
        return model(4, **quick | kw).fit(features, adjacency=graph).resolved_

    text, airport = resolved(fc.ECNMF), resolved(fc.ECNMF, *degrees_only)
    assert (text["norm"], text["row_normalise"]) == ("rw", True)
    assert (airport["norm"], airport["row_normalise"]) == ("none", False)
    literal = resolved(fc.ECNMF, *degrees_only, protocol="paper-code")
    assert (literal["norm"], literal["row_normalise"]) == ("rw", False)
    assert resolved(fc.ECNMF, *degrees_only, norm="sym")["norm"] == "sym"
    assert resolved(fc.ECNMF, *degrees_only, row_normalise=True)["row_normalise"] is True
    assert resolved(fc.HSAN)["weights"] == "none"
    assert resolved(fc.HSAN, protocol="paper-code")["weights"] == "hard"
    assert resolved(fc.HSAN, weights="hard")["weights"] == "hard"
    assert resolved(fc.HSAN, epochs=None)["epochs"] == 150
    assert resolved(fc.HSAN, epochs=None, optimizer="adam")["epochs"] == 400
