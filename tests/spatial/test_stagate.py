"""STAGATE without its output: loss and gradients are those of the dense form; parts are exact."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from cellpatch_fast.errors import InputError
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph
from cellpatch_fast.spatial.pieces import PieceFiles, piece_around, tiles_of, whole
from cellpatch_fast.spatial.stagate import Piece, Stagate, StagateConfig, quadratic_form

SPOTS, GENES, FEATURES, HIDDEN, OUTPUT = 101, 37, 5, 23, 7

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "features": {"features": FEATURES},
    "alias": {"tie": "alias"},
    "alias with features": {"features": FEATURES, "tie": "alias"},
    "dense": {"features": FEATURES, "dense": True},
    "dense alias": {"dense": True, "tie": "alias"},
    "features alone": {"features": FEATURES, "dense": True, "expression": False},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def tissue(seed: int = 0) -> tuple[sparse.csr_matrix, SpatialGraph, np.ndarray, np.ndarray]:
    """Expression, graph (with an isolated spot), features and places."""
    generator = np.random.default_rng(seed)
    places = generator.random((SPOTS, 2))
    places[17] = 5
    expression = sparse.random(SPOTS, GENES, 0.3, "csr", np.float32, random_state=seed)
    features = generator.standard_normal((SPOTS, FEATURES)).astype(np.float32)
    graph = spatial_graph(places, radius=0.15)
    assert graph.isolated
    return expression, graph, features, places


def network(kind: str, seed: int = 0) -> Stagate:
    torch.manual_seed(seed)
    model = Stagate(StagateConfig(GENES, hidden=HIDDEN, output=OUTPUT, **KINDS[kind]))
    if model.dense is not None:
        torch.nn.init.normal_(model.dense.bias)
    return model


def piece_of(kind: str) -> tuple[Piece, sparse.csr_matrix, np.ndarray, SpatialGraph]:
    expression, graph, features, _ = tissue()
    rows = features if KINDS[kind].get("features") else None
    return whole(expression, graph, rows), expression, features, graph


def dense_loss(
    model: Stagate, expression: sparse.csr_matrix, features: np.ndarray, graph: SpatialGraph
) -> Tensor:
    """As published: everything formed, a softmax over neighbours, float64."""
    config = model.config
    x = torch.from_numpy(expression.toarray()).double()
    inputs = [x] if config.expression else []
    inputs += [torch.from_numpy(features).double()] if config.features else []
    edges = torch.from_numpy(graph.distances.toarray()) > 0
    edges |= torch.eye(len(graph), dtype=torch.bool)
    h = torch.cat(inputs, 1) @ model.hidden_weight
    scores = torch.sigmoid(
        (h @ model.target_attention)[:, None] + (h @ model.source_attention)[None]
    )
    weights = torch.softmax(scores.masked_fill(~edges, -torch.inf), 1)
    z = F.elu(weights @ h) @ model.output_weight
    hidden, output = (
        (model.hidden_weight, model.output_weight)
        if config.tie == "true"
        else (model.decoder_hidden_weight, model.decoder_output_weight)
    )
    predicted = F.elu(weights @ (z @ output.T)) @ hidden.T
    predicted = predicted[:, :GENES] if model.dense is None else model.dense(predicted)
    return (predicted - x).square().sum()


@each_kind
def test_loss_and_gradients_are_those_of_the_dense_form(kind: str) -> None:
    model = network(kind)
    piece, expression, features, graph = piece_of(kind)
    loss = model.squared_error(piece)
    loss.backward()
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    right = dense_loss(exact, expression, features, graph)
    right.backward()
    assert float(loss.detach()) == pytest.approx(float(right.detach()), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-5, name


@pytest.mark.parametrize("size", [16, 29, 50, 100])
@each_kind
def test_tiles_add_up_to_the_whole(kind: str, size: int) -> None:
    model = network(kind)
    expression, graph, features, places = tissue()
    rows = features if model.config.features else None
    tiles = tiles_of(places, graph.slices, size)
    assert len(tiles) > 1
    assert max(map(len, tiles)) <= size
    assert sorted(np.concatenate(tiles)) == list(range(SPOTS))
    pieces = [piece_around(tile, expression, graph, rows) for tile in tiles]
    losses = [model.squared_error(piece) for piece in pieces]
    torch.stack(losses).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    total = model.squared_error(whole(expression, graph, rows))
    total.backward()
    added_up = float(torch.stack(losses).sum().detach())
    assert added_up == pytest.approx(float(total.detach()), rel=1e-6)
    for of_tiles, parameter in zip(gradients, model.parameters(), strict=True):
        assert of_tiles is not None
        assert parameter.grad is not None
        assert (of_tiles - parameter.grad).norm() < 1e-5 * parameter.grad.norm()
    together = model.embed(whole(expression, graph, rows))
    for tile, piece in zip(tiles, pieces, strict=True):
        torch.testing.assert_close(model.embed(piece)[: len(tile)], together[tile])


def test_permuting_spots_permutes_the_embedding() -> None:
    model = network("features")
    expression, graph, features, places = tissue()
    order = np.random.default_rng(0).permutation(SPOTS)
    permuted = whole(expression[order], spatial_graph(places[order], radius=0.15), features[order])
    embedded = model.embed(whole(expression, graph, features))
    torch.testing.assert_close(model.embed(permuted), embedded[order])


def test_an_aliased_decoder_is_stepped_twice_as_published() -> None:
    """Adam on two parameters in the same memory, one after the other, from the same weights."""
    model = network("alias")
    piece, expression, features, graph = piece_of("alias")
    assert model.decoder_hidden_weight.data_ptr() == model.hidden_weight.data_ptr()
    exact = copy.deepcopy(model).double()
    # upstream's encoder and decoder, apart: gradients of each from the same matrices
    dense_loss(exact, expression, features, graph).backward()
    expected = exact.hidden_weight.detach().clone()
    for gradient in (exact.hidden_weight.grad, exact.decoder_hidden_weight.grad):
        assert gradient is not None
        decayed = gradient + 1e-4 * expected  # of what the step before has left
        expected = expected - 1e-3 * decayed / (decayed.abs() + 1e-8)  # Adam's first step
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, foreach=False)
    model.squared_error(piece).backward()
    optimizer.step()
    assert torch.equal(model.decoder_hidden_weight, model.hidden_weight)
    torch.testing.assert_close(model.hidden_weight.double(), expected, rtol=0, atol=2e-6)


def test_an_aliased_decoder_stays_one_after_it_is_cast() -> None:
    model = network("alias").double().float()
    assert model.decoder_output_weight.data_ptr() == model.output_weight.data_ptr()


def test_pieces_on_disk_are_those_in_memory(tmp_path: Any) -> None:
    expression, graph, features, places = tissue()
    tiles = tiles_of(places, graph.slices, 29)
    files = PieceFiles(tmp_path)
    pieces = [piece_around(tile, expression, graph, features) for tile in tiles]
    for piece in pieces:
        files.add(piece)
    model = network("features")
    assert len(files) == len(tiles)
    for ours, kept in zip(pieces, files, strict=True):
        assert torch.equal(model.embed(ours), model.embed(kept))
        assert torch.equal(model.squared_error(ours), model.squared_error(kept))


def test_gradients_of_the_quadratic_form_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    h, back, image = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((11, 5), (7, 5), (11, 5))
    )
    assert torch.autograd.gradcheck(quadratic_form, (h, back, image))


def test_a_wide_quadratic_form_is_that_of_the_dense_product() -> None:
    """Products of columns with themselves are made 128 columns at a time: here of 300."""
    generator = torch.Generator().manual_seed(0)
    h, back, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((11, 300), (7, 300), (11, 7))
    )
    dense = (x - h @ back.T).square().sum() - x.square().sum()
    ours = quadratic_form(h, back, x @ back)
    torch.testing.assert_close(ours, dense)
    for one, other in zip(
        torch.autograd.grad(ours, (h, back)), torch.autograd.grad(dense, (h, back)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"genes": 0}, "widths of at least 1"),
        ({"tie": "loose"}, "unknown tie 'loose': choose true or alias"),
        ({"expression": False}, "features alone as input need features, and a dense layer"),
    ],
)
def test_a_network_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StagateConfig(**{"genes": 3} | arguments)


def test_a_tile_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="room for 16 spots or more, found 3"):
        tiles_of(np.zeros((5, 2)), np.zeros(5, np.int64), 3)
