"""A Gram matrix from its samples is the same as the matrix."""

from __future__ import annotations

import pytest
import torch

from onnx_attnround.rounding.gram import dense, diagonal, factored, identity

GROUPS, OUTPUTS, COUNT, DEPTH = 2, 3, 5, 7
GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = torch.randn(GROUPS, COUNT, DEPTH, generator=GENERATOR) + 1.0
ROWS = torch.randn(GROUPS, OUTPUTS, DEPTH, generator=GENERATOR)
MATRIX = SAMPLES.mT @ SAMPLES / COUNT
PAIRS = {
    "samples": (factored(SAMPLES), dense(MATRIX)),
    "centred": (
        factored(SAMPLES).centred(SAMPLES.mean(1)),
        dense(torch.stack([torch.cov(group.T, correction=0) for group in SAMPLES])),
    ),
    "ridged": (factored(SAMPLES).ridged(0.5), dense(MATRIX).ridged(0.5)),
    "identity": (
        identity(torch.zeros(GROUPS, 1, DEPTH)),
        dense(torch.eye(DEPTH).expand(GROUPS, DEPTH, DEPTH)),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_samples_and_matrix_give_the_same_products(case: str) -> None:
    few, full = PAIRS[case]
    part = slice(2, 5)
    torch.testing.assert_close(few.diagonal, full.diagonal)
    torch.testing.assert_close(few.part(part), full.part(part))
    torch.testing.assert_close(few.times(ROWS), full.times(ROWS))
    some = ROWS[..., part]
    torch.testing.assert_close(few.times_part(some, part), full.times_part(some, part))
    assert few.finite
    assert full.finite


def test_the_matrix_is_what_it_was_given() -> None:
    torch.testing.assert_close(dense(MATRIX).times(ROWS), ROWS @ MATRIX)
    torch.testing.assert_close(dense(MATRIX).centred(SAMPLES.mean(1)).times(ROWS),
                               PAIRS["centred"][1].times(ROWS))  # fmt: skip


def test_a_ridge_is_a_share_of_the_mean_power_and_leaves_the_matrix_as_it_is() -> None:
    before = MATRIX.clone()
    added = dense(MATRIX).ridged(0.5).diagonal - before.diagonal(dim1=1, dim2=2)
    expected = 0.5 * before.diagonal(dim1=1, dim2=2).mean(-1)
    torch.testing.assert_close(added, expected[:, None].expand_as(added))
    assert torch.equal(MATRIX, before)


def test_solving_undoes_the_product() -> None:
    for gram in (dense(MATRIX), factored(SAMPLES), diagonal(MATRIX.diagonal(dim1=1, dim2=2))):
        ridged = gram.ridged(0.1)
        torch.testing.assert_close(ridged.times(ridged.solve(ROWS)), ROWS, rtol=1e-3, atol=1e-3)


def test_a_singular_matrix_solves_to_zero() -> None:
    assert not dense(torch.zeros(1, 3, 3)).solve(torch.ones(1, 2, 3)).any()


def test_what_overflows_is_not_finite() -> None:
    huge = torch.full((1, 2, 3), 1e30)
    assert not factored(huge).finite
    assert not dense(huge.mT @ huge).finite
