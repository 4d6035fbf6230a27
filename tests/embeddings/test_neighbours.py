import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barlow.embeddings import neighbours, table
from barlow.embeddings.neighbours import nearest, pairs_above
from barlow.embeddings.table import Rows, open_table, write_table
from barlow.errors import UserError


@pytest.fixture
def stored(tmp_path):
    """`stored(x)`: vectors in a file, in row groups of 50."""

    def make(x):
        x = np.asarray(x)
        with open(tmp_path / "e.parquet", "wb") as file:
            ids = [f"r{i}" for i in range(len(x))]
            groups = [
                Rows(ids[s : s + 50], [None] * len(ids[s : s + 50]), None, x[s : s + 50])
                for s in range(0, len(x), 50)
            ]
            write_table(
                file, groups, features=x.shape[1], dtype=str(x.dtype), labelled=False, about={}
            )
        return open_table(tmp_path / "e.parquet")

    return make


def cosines(a, b):
    """Float64, written out."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@given(
    rows=st.integers(1, 230),
    features=st.integers(1, 20),
    queries=st.integers(1, 7),
    k=st.integers(1, 300),
    block=st.integers(1, 3000),
    held=st.integers(1, 100),
    dtype=st.sampled_from(["float32", "float16"]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_search_is_exact_however_it_is_cut(
    stored, monkeypatch, rows, features, queries, k, block, held, dtype
):
    with monkeypatch.context() as patch:
        patch.setattr(table, "_BLOCK_BYTES", block)
        patch.setattr(neighbours, "_BLOCK", held)
        patch.setattr(neighbours, "_QUERIES", held)
        random = np.random.default_rng(rows)
        x = random.standard_normal((rows, features)).astype(dtype)
        q = random.standard_normal((queries, features)).astype(np.float32)
        similarity, found = nearest(stored(x), torch.from_numpy(q), k)
    expected = cosines(q, x)
    k = min(k, rows)
    assert found.shape == (queries, k)
    assert all(len(set(row)) == k for row in found.tolist())
    assert np.allclose(np.take_along_axis(expected, found.numpy(), 1), similarity, atol=1e-5)
    assert np.allclose(-np.sort(-expected, 1)[:, :k], similarity, atol=1e-5)


def test_a_vector_of_zeros_is_like_nothing(stored):
    x = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    similarity, rows = nearest(stored(x), torch.tensor([[1.0, 0.0]]), 3)
    assert rows.tolist() == [[1, 0, 2]]
    assert similarity.tolist() == [[1, 0, -1]]


def test_queries_of_another_width_are_refused(stored):
    with pytest.raises(UserError, match="has 2 features per image, the query has 3"):
        nearest(stored(np.ones((4, 2), np.float32)), torch.ones(1, 3), 1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_every_pair_above_is_found_once(stored, monkeypatch, threshold):
    monkeypatch.setattr(neighbours, "_QUERIES", 30)
    monkeypatch.setattr(neighbours, "_BLOCK", 17)
    monkeypatch.setattr(table, "_BLOCK_BYTES", 200)
    x = np.random.default_rng(0).standard_normal((150, 3)).astype(np.float32)
    pairs, similarity = pairs_above(stored(x), threshold)
    i, j = np.triu_indices(150, 1)
    expected = cosines(x, x)[i, j]
    above = {(a, b) for a, b, s in zip(i, j, expected, strict=True) if s >= threshold}
    assert set(map(tuple, pairs.tolist())) == above
    assert len(pairs) == len(above)
    assert (similarity.diff() <= 0).all(), "the most similar first"


def test_equal_vectors_are_pairs_at_threshold_one(stored):
    x = np.random.default_rng(0).standard_normal((1, 300)).repeat(40, 0).astype(np.float32)
    assert len(pairs_above(stored(x), 1.0)[0]) == 40 * 39 // 2


def test_no_pairs_are_no_pairs(stored):
    pairs, similarity = pairs_above(stored(np.eye(5, dtype=np.float32)), 0.5)
    assert pairs.shape == (0, 2)
    assert similarity.shape == (0,)


def test_too_many_pairs_are_refused(stored, monkeypatch):
    monkeypatch.setattr(neighbours, "_MOST_PAIRS", 100)
    with pytest.raises(UserError, match="raise the threshold"):
        pairs_above(stored(np.ones((20, 2), np.float32)), 0.9)
