"""PMoE: size, router, options, precision and memory layout."""

import pytest
import torch
import torch.nn.functional as F

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.pmoe import PatchMoE, PatchRouter, PMoE, select_top
from backdoorbench_moe.ops.seeding import seeded

SMALL = {"widen_factor": 2, "moe_channels": 128, "expert_channels": 32}
TINY = {"widen_factor": 1, "moe_channels": 16, "expert_channels": 4, "top_k": 4}


def build(image_size=32, **options):
    with seeded(0, "init"):
        return create_model("pmoe", image_size=image_size, **options)


def images(count=8, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_default_size_is_the_references():
    with torch.device("meta"):
        model = PMoE()
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    assert sum(p.numel() for p in model.parameters()) + statistics == 3_971_242


def test_its_parts_are_its_trunk_router_experts_and_head():
    model = build(widen_factor=1, moe_channels=8, expert_channels=5)
    named = {id(p) for modules in model.components().values() for m in modules for p in m.parameters()}
    rest = {name for name, p in model.named_parameters() if id(p) not in named}
    assert rest and all(name.startswith(("trunk.", "reduce_norm.", "reduce.")) for name in rest)
    experts = model.prunable()["experts"]
    assert [(group.start, group.stop) for group in experts] == [(0, 5), (5, 10), (10, 15), (15, 20)]


def test_keras_conventions():
    model = PMoE(**TINY)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("kernel", "bound"),
    [
        # Glorot uniform: sqrt(6 / (fan in + fan out)), fans counting the kernel's area.
        ("trunk.stem", (6 / (9 * 3 + 9 * 16)) ** 0.5),
        ("trunk.block2.shortcut", (6 / (160 + 320)) ** 0.5),
        ("reduce", (6 / (9 * 320 + 9 * 640)) ** 0.5),
        ("moe.conv", (6 / (640 + 160)) ** 0.5),
        ("head", (6 / (640 + 10)) ** 0.5),
    ],
)
def test_kernels_are_glorot_uniform(kernel, bound):
    weight = build().get_submodule(kernel).weight
    assert bound * 0.98 < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)


def test_gates_start_with_the_given_standard_deviation():
    assert build().moe.router.weight.std().item() == pytest.approx(1e-4, rel=0.05)
    assert build(gate_std=0.5).moe.router.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_router_by_hand():
    """One image of 1x4 cells with two channels, two experts: weights e^0, e^1, e^2, e^3 over their sum."""
    router = PatchRouter(2, num_experts=2, top_k=2, gate_std=0.0)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[[[0.0, 3.0, 1.0, 2.0]], [[1.0, 1.0, 0.0, 1.0]]]])
    gates, selected = router(features)
    # e = 2.718282: 1 + e + e^2 + e^3 = 31.192874 and 3e + 1 = 9.154845.
    want = [[0.032059, 0.643914, 0.087144, 0.236883], [0.296923, 0.296923, 0.109232, 0.296923]]
    torch.testing.assert_close(gates, torch.tensor([want]), rtol=0, atol=2e-6)
    # Of three equal gates, the first two are selected.
    assert selected.tolist() == [[[False, True, False, True], [True, True, False, False]]]


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_ties_still_choose_exactly_k(top_k):
    selected = select_top(torch.full((2, 3, 7), 1 / 7), top_k)
    assert selected.sum(-1).eq(top_k).all()
    assert selected[..., :top_k].all()


def test_unrouted_cells_leave_as_the_experts_constant():
    moe = PatchMoE(6, 3, num_experts=2, top_k=2, gate_std=1.0).train()
    torch.nn.init.normal_(moe.norm.bias)
    outputs, _, selected = moe(torch.randn(4, 6, 4, 4))
    for expert in range(2):
        # (B, H, W, D): every cell the expert did not choose, of whatever image.
        own = outputs[:, 3 * expert : 3 * expert + 3].permute(0, 2, 3, 1)
        unrouted = own[~selected[:, expert].reshape(4, 4, 4)]
        assert len(unrouted) == 4 * 14
        torch.testing.assert_close(unrouted, unrouted[:1].expand_as(unrouted))
        assert own.std() > 1e-3


def test_one_expert_for_all_cells_is_the_dense_layer():
    """Router weights of zero give every cell the gate 1/P and drop none; BN cancels this factor except for eps."""
    moe = PatchMoE(6, 3, num_experts=1, top_k=16, gate_std=0.0).double().train()
    features = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    outputs, gates, selected = moe(features)
    # BN of x / 16 with some eps is BN of x with 16 * 16 times that eps.
    dense = F.batch_norm(features, None, None, training=True, eps=256e-3).relu()
    dense = F.conv2d(dense, moe.conv.weight)
    torch.testing.assert_close(outputs, dense)
    assert selected.all() and gates.eq(1 / 16).all()


def test_experts_do_not_see_each_other():
    moe = PatchMoE(6, 3, num_experts=3, top_k=4, gate_std=1.0)
    features = torch.randn(4, 6, 4, 4)
    before = moe(features)[0]
    with torch.no_grad():
        moe.router.weight[1].normal_()
        moe.conv.weight[3:6].normal_()
    changed = (moe(features)[0] - before).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("size", [8, 32, 64])
def test_other_image_sizes(size):
    model = build(size, **TINY)
    side = size // 4
    assert model.patch_grid == (side, side) and model.patch_size == 4
    output = model.forward_routed(images(2, size))
    assert output.logits.shape == (2, 10)
    (routing,) = output.routing
    assert routing.layer == "moe" and isinstance(model.get_submodule(routing.layer), PatchMoE)
    assert routing.gates.shape == routing.selected.shape == (2, 4, side * side)
    assert routing.selected.sum(-1).eq(4).all()
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (64, 8), (64, 16), (224, 16)])
def test_larger_patches(size, patch):
    model = build(size, patch_size=patch, **TINY).eval()
    side = size // patch
    assert model.patch_grid == (side, side) and model.patch_size == patch
    (routing,) = model.forward_routed(images(1, size)).routing
    assert routing.selected.shape == (1, 4, side * side) and routing.selected.sum(-1).eq(4).all()


def test_patches_of_4_add_nothing_to_the_reference():
    """Patches of 8 add a norm and a 3x3 convolution to the tensors of patches of 4."""
    plain, coarse = build(**SMALL), build(64, patch_size=8, **SMALL)
    names = set(coarse.state_dict()) - set(plain.state_dict())
    assert {name.rpartition(".")[0] for name in names} == {"trunk.halving1.0", "trunk.halving1.2"}
    added = sum(p.numel() for p in coarse.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * 16 + 16 * 16 * 9 + 16
    assert coarse.trunk.halving1[0].momentum == 0.01
    assert (
        build(**SMALL).state_dict().keys()
        == plain.state_dict().keys()
        == build(**SMALL, patch_size=4).state_dict().keys()
    )


def test_the_order_of_the_trunk():
    names = [name for name, _ in build(64, patch_size=16, **TINY).trunk.named_children()]
    assert names == ["stem", "halving1", "halving2", "block1", "block2"]


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_cell_sees_the_whole_of_its_own_tile(patch):
    """The gradient of one cell of the routed map reaches every pixel of its tile."""
    size = 4 * patch
    model = build(size, patch_size=patch, **TINY).double().eval()
    pixels = images(1, size).double().requires_grad_()
    seen = []
    model.moe.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(pixels)
    assert seen[0].shape[-2:] == model.patch_grid
    (gradient,) = torch.autograd.grad(seen[0][0, :, 1, 2].sum(), pixels)
    tile = gradient[0, :, patch : 2 * patch, 2 * patch : 3 * patch]
    assert tile.shape[-1] == patch and (tile != 0).any(0).all()


@pytest.mark.parametrize("patch", [8, 16])
def test_an_image_moved_by_a_tile_moves_the_map_by_a_cell(patch):
    model = build(8 * patch, patch_size=patch, **TINY).double().eval()
    seen = []
    model.moe.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    pixels = images(1, 8 * patch).double()
    model(pixels)
    model(pixels.roll((patch, 2 * patch), (2, 3)))
    # At least two cells from the edge, beyond the influence of the padding and of what was rolled in.
    torch.testing.assert_close(seen[1][..., 4:6, 4:6], seen[0][..., 3:5, 2:4], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"image_size": 30}, "image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 36, "patch_size": 8}, "image_size"),
        ({"image_size": 8, "patch_size": 16}, "image_size"),
        ({"patch_size": 2}, "patch_size"),
        ({"patch_size": 12}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"image_size": 32, "patch_size": 16, "top_k": 5}, "top_k"),
        ({"top_k": 65}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"image_size": 8, "top_k": 5}, "top_k"),
        ({"num_experts": 0}, "num_experts"),
        ({"widen_factor": 0}, "widen_factor"),
        ({"moe_channels": -1}, "moe_channels"),
        ({"expert_channels": 0}, "expert_channels"),
        ({"num_classes": 0}, "num_classes"),
        ({"gate_std": -1.0}, "gate_std"),
        ({"gate_std": float("nan")}, "gate_std"),
    ],
)
def test_impossible_sizes_are_refused(options, parameter):
    with pytest.raises(ConfigError, match=f"^{parameter}: expected"):
        create_model("pmoe", **{**TINY, **options})


def train(model, batches, *, bf16):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for batch in range(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images(16) * (batch + 1) / batches), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_bf16_agrees_with_fp32():
    fp32, bf16 = build(**SMALL), build(**SMALL).to(memory_format=torch.channels_last)
    want, got = train(fp32, 3, bf16=False), train(bf16, 3, bf16=True)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert (want[0] - want[-1]).abs() > 0.1


def test_router_and_statistics_are_fp32_under_autocast():
    model = build(gate_std=0.1, **SMALL)
    seen = {}
    model.moe.register_forward_hook(lambda _, args, __: seen.update(features=args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        (routing,) = model.forward_routed(images()).routing
    assert seen["features"].dtype == torch.bfloat16 and routing.gates.dtype == torch.float32
    logits = torch.einsum("ec,bchw->behw", model.moe.router.weight, seen["features"].float())
    # bf16 would be off by 0.4%.
    torch.testing.assert_close(routing.gates, logits.flatten(2).softmax(-1), rtol=1e-4, atol=0)
    assert model.moe.norm.running_mean.dtype == torch.float32


def test_channels_last_changes_nothing():
    plain, last = build(**SMALL), build(**SMALL).to(memory_format=torch.channels_last)
    torch.testing.assert_close(train(last, 2, bf16=False), train(plain, 2, bf16=False), rtol=1e-4, atol=1e-4)


def test_routed_map_stays_channels_last():
    model = build(**TINY).to(memory_format=torch.channels_last)
    seen = []
    model.moe.norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(images().to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_each_image_is_routed_for_itself():
    model = build(gate_std=1.0, **TINY).eval()
    together = model.forward_routed(images(4)).routing[0]
    alone = model.forward_routed(images(4)[2:3]).routing[0]
    assert torch.equal(alone.selected[0], together.selected[2])
