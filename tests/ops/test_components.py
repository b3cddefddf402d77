"""Principal components against NumPy's singular value decomposition, and vectors that do not vary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backdoorbench_moe.ops.components import principal_components


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)], ids=["tall", "wide"])
def test_they_are_the_singular_vectors_of_the_centred_vectors(shape) -> None:
    vectors = draw(*shape) * torch.linspace(1, 5, shape[1]) + 7
    coordinates, directions = principal_components(vectors, 3)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(coordinates.abs(), np.abs(left[:, :3] * sizes[:3]), atol=1e-6)
    np.testing.assert_allclose(directions.abs(), np.abs(right[:3]), atol=1e-6)
    np.testing.assert_allclose(coordinates, centred @ directions.numpy().T, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 5), (5, 30)])
def test_there_are_as_many_as_the_rank(shape) -> None:
    plane = draw(shape[0], 2) @ draw(2, shape[1], seed=1)
    assert principal_components(plane, 4)[0].shape == (shape[0], 2)
    same = torch.full(shape, 3.3)
    coordinates, directions = principal_components(same, 4)
    assert coordinates.shape == (shape[0], 0) and directions.shape == (0, shape[1])
