"""The models: choice of blocks, structure, upcycling, and errors for bad options."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from bbmoe_vmoe.surgery import choose_blocks
from safetensors.torch import save_file
from torch import nn

from backdoorbench_moe.config import PartSpec, TrainSpec
from backdoorbench_moe.defenses import create_defense
from backdoorbench_moe.engine.training.step import make_optimizer
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.moe.experts import kept_muted, mute
from backdoorbench_moe.moe.pruning import silence
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.testing.making import changed, copies, make_task

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 2}
DENSE = "timm:vit_tiny_patch16_224"
NAMES = ["vmoe", "soft-moe"]


def build(name="vmoe", *, seed=0, **options):
    with seeded(seed, "init"):
        return create_model(name, num_classes=3, **{**SMALL, **options})


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("wanted", "depth", "blocks"),
    [
        ("every-2", 12, (1, 3, 5, 7, 9, 11)),
        ("last-2", 12, (9, 11)),
        ("last-2", 5, (1, 3)),
        ("all", 3, (0, 1, 2)),
        ("5,1", 6, (1, 5)),
        ((2, 0), 3, (0, 2)),
        (2, 3, (2,)),
    ],
)
def test_blocks_as_in_v_moe(wanted, depth, blocks):
    assert choose_blocks(wanted, depth) == blocks


@pytest.mark.parametrize(
    "wanted", ["last-3", "last-0", "last-", "4", "1,1", "odd", "", (), (-1,), "every-2 "]
)
def test_blocks_that_do_not_exist_are_one_clear_line(wanted):
    with pytest.raises(ConfigError, match=r"^moe_blocks: expected .+, got .+$"):
        choose_blocks(wanted, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vit": "resnet18"},
            "^vit: expected a vision transformer .* got 'resnet18'$",
        ),
        (
            {"vit": "vit_tiny_patch16_22"},
            "^vit: unknown 'vit_tiny_patch16_22'; did you mean 'vit_tiny",
        ),
        ({"num_experts": 2, "top_k": 3}, "top_k: expected 1 to 2, the number of experts, got 3"),
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"router": "switch", "top_k": 2}, "top_k: expected 1, or none, for router 'switch', got 2"),
        ({"capacity": 0.0}, "capacity: expected a positive number"),
        ({"noise": -1.0}, "noise: expected a number of at least 0"),
        ({"depth": 0}, "depth: expected an integer of at least 1, got 0"),
        ({"num_heads": 3}, "^num_heads: expected a divisor of the embed_dim of timm's 'vit_tiny"),
        ({"patch_size": 5}, "patch_size: expected a divisor of the image's 32 pixels, got 5"),
        ({"upcycle": ""}, "upcycle: expected copy, or"),
        (
            {"image_size": 31},
            "^patch_size: timm's 'vit_tiny_patch16_224' has patches of 16, and neither .* 31 pixels",
        ),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ConfigError) as caught:
        build(**options)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vit", "size"),
    [
        ("test_resnet", 56),
        ("vit_small_patch16_18x2_224", 56),
        ("eva02_tiny_patch14_224", 56),
        ("vit_tiny_r_s16_p8_224", 64),
        ("deit_tiny_distilled_patch16_224", 224),
    ],
)
def test_other_than_a_plain_transformer_is_refused(vit, size):
    """A convolutional network, and transformers with two MLPs in a block, gated MLPs, convolutions, two classifiers."""
    with pytest.raises(ConfigError, match=f"^vit: expected a vision transformer .* got '{vit}'$"):
        create_model("vmoe", vit=vit, image_size=size)


@pytest.mark.parametrize("name", NAMES)
def test_with_one_expert_it_is_its_dense_twin(name):
    """With one expert that copies the MLP. Soft MoE mixes tokens even then, so only its other weights are compared."""
    dense = build(DENSE).eval()
    model = build(name, num_experts=1, upcycle="copy").eval()
    if name == "vmoe":
        assert torch.equal(model(images()), dense(images()))
    own, there = dense.state_dict(), model.state_dict()
    assert all(torch.equal(own[key], there[key]) for key in own.keys() & there.keys())
    assert {key for key in own if key not in there} == {
        f"network.blocks.{block}.mlp.{part}"
        for block in (1, 3)
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }


@pytest.mark.slow
def test_with_one_expert_it_trains_as_its_dense_twin():
    """Including weight decay, which is not applied to biases in both."""
    dense, model = build(DENSE).train(), build(num_experts=1, upcycle="copy").train()
    spec = TrainSpec(optimizer="adamw", lr=0.01, weight_decay=0.5)
    for network in (dense, model):
        optimizer = make_optimizer(network, spec, torch.device("cpu"))
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images()), torch.tensor([0, 1, 2, 1])).backward()
            optimizer.step()
    own, there = dense.state_dict(), model.state_dict()
    assert own["network.blocks.3.mlp.fc1.bias"].abs().max() > 0.01
    for key, tensor in own.items():
        copied = re.sub(r"([13])\.mlp\.", r"\1.mlp.experts.", key)
        torch.testing.assert_close(there[copied], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_reports_its_routing(name):
    model = build(name, moe_blocks="1,2,3").eval()
    output = model.forward_routed(images())
    assert [routing.layer for routing in output.routing] == [f"network.blocks.{n}.mlp" for n in (1, 2, 3)]
    assert all(routing.gates.shape == (4, 8, 64) and routing.aux_loss is None for routing in output.routing)
    losses = [routing.aux_loss for routing in model.train().forward_routed(images()).routing]
    assert (losses == [None] * 3) == (name == "soft-moe")


@pytest.mark.parametrize(
    ("router", "per_token", "per_expert"),
    [("top-k", 2, None), ("switch", 1, None), ("expert-choice", None, 17)],
)
def test_routers(router, per_token, per_expert):
    """65 tokens with the class token; each expert takes 17 = ceil(2 * 65 / 8), which may include the class token."""
    [first, *_] = build(router=router).eval().forward_routed(images()).routing
    if per_token:
        assert (first.selected.sum(1) == per_token).all()
    else:
        assert set(first.selected.sum(2).flatten().tolist()) <= {per_expert - 1, per_expert}


@pytest.mark.parametrize("name", NAMES)
def test_no_images(name):
    model = build(name).eval()
    output = model.forward_routed(images(0))
    assert output.logits.shape == (0, 3) and all(len(routing.gates) == 0 for routing in output.routing)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_routes_by_itself(name):
    model = build(name).train()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.network.blocks[1].mlp.experts.heard.zero_()
    torch.manual_seed(0)
    first = model(images())
    torch.manual_seed(0)
    assert torch.equal(model(images()), first)
    torch.manual_seed(0)
    assert not torch.equal(twin(images()), first)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_expert_is_kept_in_the_state_and_has_no_effect(name):
    model = build(name).eval()
    expert = model.experts()[9]
    assert (expert.layer, expert.index) == ("network.blocks.3.mlp", 1)
    model.mask_expert(expert)
    read = build(name, seed=3).eval()
    read.load_state_dict(model.state_dict())
    before = read(images())
    [_, routing] = read.forward_routed(images()).routing
    assert not routing.selected[:, 1].any() and routing.selected[:, 0].any()
    with torch.no_grad():
        read.network.blocks[3].mlp.experts.fc2.weights[1] += 1
    assert torch.equal(read(images()), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_expert_stays_masked_when_the_router_is_reset(name):
    model = build(name).eval()
    model.mask_expert(model.experts()[9])
    before = copies(model)
    task, reported = make_task(model, PartSpec(name, SMALL))
    create_defense("router-reset", epochs=1)(task)
    [(_, reset)] = reported
    routers = {key for key in before if ".router." in key and before[key].is_floating_point()}
    assert changed(before, reset) == routers - {key for key in routers if key.endswith(".scale")}
    masked = {key: value.tolist() for key, value in copies(model).items() if key.endswith(".masked")}
    assert list(masked.values()) == [[False] * 8, [False, True, *[False] * 6]]


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_pruned_are_hidden_units_of_the_last_layer_of_experts_and_of_the_mlp_before(name):
    found = build(name).prunable()
    assert [(group.start, group.stop) for group in found["experts"]] == [
        (64 * e, 64 * e + 64) for e in range(8)
    ]
    assert build(name, moe_blocks="all").prunable().keys() == {"experts"}
    model = build(name, moe_blocks="3").eval()
    [trunk], experts = model.prunable()["trunk"], model.prunable()["experts"]
    assert trunk.layer is model.network.blocks[2].mlp.fc1
    # Without any of them, the two MLPs add only a bias.
    for group in [trunk, *experts]:
        silence(group.layer, torch.arange(group.start, group.stop))
    for block in (2, 3):
        mlp, seen = model.network.blocks[block].mlp, []
        hook = mlp.register_forward_hook(lambda m, _, output, seen=seen: seen.append(output))
        model(images())
        hook.remove()
        assert torch.allclose(seen[0], seen[0][:1, :1].expand_as(seen[0]), atol=1e-7)


def test_a_muted_expert_stays_so_in_training():
    model = build()
    muted = model.experts()[:1]
    mute(model, muted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with kept_muted(model, muted):
        model.train()(images()).sum().backward()
        optimizer.step()
    assert model.network.blocks[1].mlp.experts.heard.tolist() == [0.0] + [1.0] * 7


@pytest.fixture
def dense_file(tmp_path):
    save_file(
        {k: v.contiguous() for k, v in build(DENSE, seed=5).state_dict().items()},
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_upcycling_copies_the_dense_model(name, dense_file):
    dense, model = build(DENSE, seed=5).eval(), build(name, upcycle=str(dense_file)).eval()
    before = model.network.blocks[1].mlp.router.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    model.load_start()
    assert len(model.upcycled_from) == 64
    own = dense.network.blocks[3].mlp
    experts = model.network.blocks[3].mlp.experts
    assert all(torch.equal(weight, own.fc1.weight) for weight in experts.fc1.weights)
    assert all(torch.equal(bias, own.fc2.bias) for bias in experts.fc2.biases)
    assert torch.equal(model.network.blocks[0].mlp.fc1.weight, dense.network.blocks[0].mlp.fc1.weight)
    assert torch.equal(model.network.head.weight, dense.network.head.weight)
    router = model.network.blocks[1].mlp.router.state_dict()
    assert all(torch.equal(router[key], tensor) for key, tensor in before.items())


def test_with_all_experts_chosen_an_upcycled_model_answers_as_the_dense_one(dense_file):
    """All experts are the same MLP, and their gates sum to 1."""
    model = build(upcycle=str(dense_file / "model.safetensors"), num_experts=3, top_k=3).eval()
    model.load_start()
    torch.testing.assert_close(model(images()), build(DENSE, seed=5).eval()(images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40),
            "expected a file of safetensors",
        ),
        (
            lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
            "dense transformer; it has an unexpected a",
        ),
        (
            lambda folder: save_file(
                {k: v.contiguous() for k, v in build(DENSE, embed_dim=32).state_dict().items()},
                folder / "model.safetensors",
            ),
            r"expected shape \(.*16.*\), got \(.*32.*\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(change, message, dense_file):
    change(dense_file)
    model = build(upcycle=str(dense_file))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=f"^upcycle: .*{message}"):
        model.load_start()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
