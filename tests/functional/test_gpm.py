"""GPM's spaces of inputs against the paper's SVD of stored inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cl.functional import add_gram_, extend_basis
from lightning_cl.functional.gpm import empty_gram, input_shape


def by_svd(basis: Tensor, stored: Tensor, threshold: float) -> Tensor:
    """The paper's criterion, from the singular vectors of the stored inputs [d, n]."""
    rest = stored - basis @ basis.T @ stored
    left, singular, _ = torch.linalg.svd(rest)
    energy = stored.square().sum()
    captured, taken = energy - rest.square().sum(), 0
    while captured < threshold * energy:
        captured, taken = captured + singular[taken] ** 2, taken + 1
    return torch.cat([basis, left[:, :taken]], 1)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.97, 0.999])
def test_the_papers_criterion(threshold: float) -> None:
    """The same space as from stored inputs, over three tasks."""
    basis = expected = torch.zeros(12, 0, dtype=torch.float64)
    for _ in range(3):
        stored = torch.randn(12, 4, dtype=torch.float64) @ torch.randn(4, 30, dtype=torch.float64)
        basis, expected = extend_basis(basis, stored @ stored.T, threshold), by_svd(expected, stored, threshold)
        assert basis.shape == expected.shape
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T)


def test_threshold_one_takes_the_span_and_no_rounding() -> None:
    """Inputs of float32 that span four of nine dimensions: four directions, and none more when they come again."""
    inputs = torch.randn(50, 4) @ torch.randn(4, 9)
    layer = nn.Linear(9, 2, bias=False)
    gram = add_gram_(empty_gram(layer, constant=False, device=torch.device("cpu")), layer, inputs)[0]
    basis = extend_basis(torch.zeros(9, 0, dtype=torch.float64), gram, 1.0)
    assert basis.shape == (9, 4)
    torch.testing.assert_close(inputs.double() @ basis @ basis.T, inputs.double(), rtol=0, atol=1e-5)
    assert extend_basis(basis, gram, 1.0).shape == (9, 4)


def test_a_space_that_holds_enough_does_not_grow() -> None:
    """What the basis captures counts; inputs of no energy add nothing."""
    basis = torch.eye(3, dtype=torch.float64)[:, :1]
    gram = torch.diag(torch.tensor([98.0, 2.0, 0.0], dtype=torch.float64))
    assert torch.equal(extend_basis(basis, gram, 0.97), basis)
    assert extend_basis(basis, gram, 0.99).shape == (3, 2)
    assert torch.equal(extend_basis(basis, torch.zeros_like(gram), 1.0), basis)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "kernel_size": (2, 3)},
    "depthwise": {"groups": 4},
    "same": {"padding": "same", "dilation": 2},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_patches_are_what_the_weight_is_multiplied_by(settings: dict[str, Any]) -> None:
    """The squared outputs of a convolution, summed over samples and positions, are w G wᵀ for each output."""
    layer = nn.Conv2d(4, 8, **({"kernel_size": 3} | settings)).double()
    images = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    groups, length = input_shape(layer, constant=True)
    gram = add_gram_(empty_gram(layer, constant=True, device=torch.device("cpu")), layer, images)
    assert gram.shape == (groups, length, length)
    rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().view(groups, -1, length)
    squares = (rows @ gram @ rows.mT).diagonal(dim1=1, dim2=2).flatten()
    torch.testing.assert_close(squares, layer(images).detach().square().sum((0, 2, 3)))
    torch.testing.assert_close(
        add_gram_(torch.zeros_like(gram), layer, images[0]), add_gram_(0 * gram, layer, images[:1])
    )


def test_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch is read in parts, with the same sum."""
    layer, images = nn.Conv2d(2, 3, 3), torch.randn(5, 2, 6, 6)
    whole = add_gram_(empty_gram(layer, constant=False, device=torch.device("cpu")), layer, images)
    monkeypatch.setattr("lightning_cl.functional.gpm._PATCHES", 2 * 18 * 36)
    torch.testing.assert_close(
        add_gram_(empty_gram(layer, constant=False, device=torch.device("cpu")), layer, images), whole
    )


def test_gram_is_where_the_inputs_are() -> None:
    """Not where the weight is."""
    gram = empty_gram(nn.Linear(3, 2), constant=True, device=torch.device("meta"))
    assert (gram.device.type, gram.shape, gram.dtype) == ("meta", (1, 4, 4), torch.float64)


def test_every_position_counts_but_padding() -> None:
    """Inputs [n, T, d]; a mask of another shape says nothing of them."""
    layer, inputs = nn.Linear(3, 2), torch.randn(2, 4, 3)
    present = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = torch.cat([inputs[0, :3], inputs[1, :1]]).double()
    gram = torch.zeros(1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(add_gram_(gram.clone(), layer, inputs, present)[0], expected.T @ expected)
    everything = inputs.flatten(0, 1).double()
    for mask in (None, present[:, :3]):
        torch.testing.assert_close(add_gram_(gram.clone(), layer, inputs, mask)[0], everything.T @ everything)


def test_wide_sums_in_float32_reach_the_threshold() -> None:
    """Where few large directions stand before many small ones, which hold the rest of the energy together."""
    gram = torch.diag(torch.tensor([100.0] * 2 + [0.01] * 598))
    basis = extend_basis(torch.zeros(600, 0), gram, 0.99)
    # of 5.98, all but a hundredth of 205.98
    assert basis.shape == (600, 2 + 393)
    assert basis.dtype == torch.float32


def test_rounding_of_a_float32_sum_is_no_direction() -> None:
    """Inputs that span 20 of 200 dimensions, summed in float32 over batches."""
    inputs = torch.randn(4096, 20, dtype=torch.float64) @ torch.randn(20, 200, dtype=torch.float64)
    layer, gram = nn.Linear(200, 1, bias=False), torch.zeros(1, 200, 200)
    for rows in inputs.float().split(64):
        add_gram_(gram, layer, rows)
    basis = extend_basis(torch.zeros(200, 0), gram[0], 1.0)
    assert basis.shape == (200, 20)
    assert torch.equal(extend_basis(basis, gram[0], 1.0), basis)
