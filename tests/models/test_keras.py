"""A PMoE with the reference's weights against a plain implementation in float64 and against Keras."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_weights import draw_batches, draw_weights
from plain_pmoe import plain_pmoe

from backdoorbench_moe.errors import ConfigError, ShapeError
from backdoorbench_moe.models.keras import keras_slots, pmoe_from_keras

TOP_K = 5


def as_tensors(arrays):
    # Rounded to float32, the precision of the model's weights.
    return [torch.from_numpy(array.astype(np.float32)).double() for array in arrays]


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convert(weights):
    arrays = [np.asarray(weight) for weight in weights]
    return pmoe_from_keras(arrays, image_size=16, top_k=TOP_K).double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("experts", [1, 4])
def test_outputs_and_routing_equal_the_plain_model(images, training, experts):
    weights = as_tensors(draw_weights(num_experts=experts, seed=experts))
    model = convert(weights).train(training)
    logits, gates, selected, _ = plain_pmoe(
        images, weights, top_k=TOP_K, training=training, num_experts=experts
    )
    output = model.forward_routed(images)
    (routing,) = output.routing
    assert routing.layer == "moe"
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(routing.gates.double(), gates, rtol=1e-5, atol=1e-7)
    assert torch.equal(routing.selected, selected)


# Index of the first array of each batch norm in the list, for 4 experts; means and variances are 2 and 3 behind it.
NORMS = (2, 8, 16, 22, 30, 40, 44, 48, 52, 64)
STATISTICS = {first + 2 for first in NORMS} | {first + 3 for first in NORMS}


def test_sgd_steps_equal_the_plain_model(images):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    weights = as_tensors(draw_weights())
    model = convert(weights).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for index, weight in enumerate(weights):
            weight.requires_grad_(index not in STATISTICS)
        logits, _, _, moving = plain_pmoe(images, weights, top_k=TOP_K, training=True)
        F.cross_entropy(logits, labels).backward()
        weights = [w.detach() if w.grad is None else (w - 0.1 * w.grad).detach() for w in weights]
        for first, (mean, variance) in zip(NORMS, moving, strict=True):
            weights[first + 2], weights[first + 3] = mean, variance
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    want, got = convert(weights).state_dict(), model.state_dict()
    for name in want:
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_keras_itself_computes_the_same():
    """Against numbers that Keras computed, see `keras_golden.py`."""
    golden = json.loads((Path(__file__).parent / "keras_golden.json").read_text())
    model = pmoe_from_keras(draw_weights(), image_size=16, top_k=TOP_K).train()
    pictures, labels = (torch.from_numpy(array) for array in draw_batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, label, loss in zip(pictures, labels, golden["losses"], strict=True):
        step = F.cross_entropy(model(batch.permute(0, 3, 1, 2)), label)
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
        assert step.item() == pytest.approx(loss, rel=1e-5)
    output = model.eval().forward_routed(pictures[0].permute(0, 3, 1, 2))
    (routing,) = output.routing
    torch.testing.assert_close(
        output.logits.softmax(1), torch.tensor(golden["outputs"]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(routing.gates, torch.tensor(golden["gates"]), rtol=1e-4, atol=1e-5)
    assert routing.selected.tolist() == golden["selected"]
    for slot, norm in zip(keras_slots(model), golden["norms"], strict=True):
        assert slot.ours.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), slot.name


def test_the_reference_has_70_arrays():
    assert len(draw_weights()) == 70
    assert len(list(keras_slots(convert(draw_weights())))) == 70


def test_default_sizes_are_read_off_the_arrays():
    weights = draw_weights(widen_factor=2, moe_channels=24, expert_channels=6, num_classes=7)
    model = pmoe_from_keras(weights)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert model.trunk.block2.conv2.out_channels == 64
    assert model.moe.conv.out_channels == 24


def test_the_callers_random_stream_is_left_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    pmoe_from_keras(draw_weights())
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("index", [0, 1, 5, 6, 12, 34, 36, 39, 43, 56, 57, 67, 68])
def test_every_array_is_checked(index):
    arrays = draw_weights()
    arrays[index] = np.concatenate([arrays[index]] * 2, axis=0)
    with pytest.raises(ShapeError, match=rf"weights\[{index}\]"):
        pmoe_from_keras(arrays)


def test_wrong_counts_and_values_are_refused():
    arrays = draw_weights()
    with pytest.raises(ShapeError, match=r"expected 70 arrays .* got 69"):
        pmoe_from_keras(arrays[:-1])
    with pytest.raises(ShapeError, match=r"weights\[4\]"):
        pmoe_from_keras([*arrays[:4], np.full(16, np.nan), *arrays[5:]])
    with pytest.raises(
        ShapeError, match=r"weights\[4\]: expected an array of finite float32 numbers, got float64"
    ):
        pmoe_from_keras([*arrays[:4], np.full(16, 1e300), *arrays[5:]])
    with pytest.raises(ShapeError, match=r"weights\[4\]: .* lists of different lengths"):
        pmoe_from_keras([*arrays[:4], [[1.0], [1.0, 2.0]], *arrays[5:]])
    with pytest.raises(ShapeError, match=r"weights\[6\]"):
        pmoe_from_keras([*arrays[:6], np.zeros((3, 3, 16, 15)), *arrays[7:]])
    with pytest.raises(ShapeError, match=r"weights\[34\]"):
        pmoe_from_keras([*arrays[:34], np.float64(1), *arrays[35:]])
    with pytest.raises(ConfigError, match="top_k"):
        pmoe_from_keras(arrays, top_k=65)
