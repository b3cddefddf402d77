"""timm's architectures at small sizes."""

import pytest
import timm
import torch

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.models.timm_models import TimmModel


def build(architecture, **options):
    return create_model(f"timm:{architecture}", **options)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("tried to go to the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_resnet_gets_a_small_stem_for_small_images():
    network = build("resnet10t", image_size=32).network
    assert network.conv1[0].stride == (1, 1)
    assert isinstance(network.maxpool, torch.nn.Identity)
    # Strides 1, 2, 2, 2 are left: an eighth of the image.
    assert network.forward_features(torch.rand(1, 3, 32, 32)).shape[2:] == (4, 4)


def test_a_7x7_stem_becomes_3x3():
    conv = build("resnet18", image_size=32).network.conv1
    assert conv.weight.shape == (64, 3, 3, 3) and conv.padding == conv.stride == (1, 1)


def test_small_stem_can_be_chosen():
    kept = build("resnet10t", image_size=32, small_stem=False).network
    want = timm.create_model("resnet10t", num_classes=10)
    assert {k: v.shape for k, v in kept.state_dict().items()} == {
        k: v.shape for k, v in want.state_dict().items()
    }
    assert isinstance(kept.maxpool, torch.nn.MaxPool2d)
    assert isinstance(build("resnet10t", image_size=96).network.maxpool, torch.nn.MaxPool2d)
    assert isinstance(build("resnet10t", image_size=96, small_stem=True).network.maxpool, torch.nn.Identity)


@pytest.mark.parametrize(
    ("architecture", "image_size", "patch_size"),
    [
        ("vit_tiny_patch16_224", 32, 4),
        ("vit_tiny_patch16_224", 64, 8),
        ("vit_tiny_patch16_224", 128, 16),
        ("test_vit", 160, 16),
        ("vit_small_patch32_224", 224, 32),
    ],
)
def test_vit_patches_follow_the_image(architecture, image_size, patch_size):
    with torch.device("meta"):
        model = build(architecture, image_size=image_size)
    assert model.patch_size == patch_size
    assert model.network.patch_embed.num_patches == (image_size // patch_size) ** 2


def test_an_image_that_no_patch_covers_is_refused_rather_than_cut():
    """28 and 36: neither 16 nor 8 divides them, and a grid of whole patches would leave a margin unseen."""
    for size in (28, 36, 225):
        with pytest.raises(
            ConfigError, match=rf"^patch_size: .*patches of 16.*{size} pixels; expected one of 1, "
        ):
            build("vit_tiny_patch16_224", image_size=size)
    assert build("test_vit", image_size=28, patch_size=4).patch_size == 4
    assert build("test_vit", image_size=80).patch_size == 10


def test_heads_that_do_not_divide_the_features_are_named():
    with pytest.raises(
        ConfigError, match=r"^num_heads: expected a divisor of the embed_dim of timm's 'test_vit'$"
    ):
        build("test_vit", image_size=32, num_heads=5)


@pytest.mark.parametrize(
    ("architecture", "size", "layer"),
    [
        ("test_vit", 32, "blocks.5.mlp.fc1"),
        ("test_resnet", 32, "layer4.0.conv2"),
        ("coatnet_rmlp_nano_rw_224", 64, "stages.1.blocks.3.conv2_kxk"),
    ],
)
def test_what_is_pruned_lies_on_the_way_of_the_features(architecture, size, layer):
    model = build(architecture, image_size=size)
    [group] = model.prunable()["trunk"]
    assert group.layer is model.network.get_submodule(layer)


def test_patch_size_can_be_chosen():
    model = build("test_vit", image_size=32, patch_size=8)
    assert model.patch_size == 8
    assert model.network.patch_embed.num_patches == 16


def test_convolutional_models_have_no_patch_size():
    assert not hasattr(build("mobilenetv3_small_050"), "patch_size")


@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", "mobilenetv3_small_050", "convnext_atto"]
)
@pytest.mark.parametrize("size", [32, 48])
def test_a_step_of_training(architecture, size):
    model = build(architecture, num_classes=5, image_size=size)
    assert model.training
    logits = model(torch.rand(2, 3, size, size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build("test_resnet").state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_unknown_architectures_are_refused_with_near_names():
    with pytest.raises(UnknownNameError, match=r"'resnet81'; did you mean 'resnet18'") as caught:
        build("resnet81")
    assert len(str(caught.value)) < 400
    with pytest.raises(UnknownNameError, match="architecture"):
        build("hf-hub:someone/something")
    with pytest.raises(UnknownNameError):
        build("")


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("test_resnet", {"patch_size": 4}, "patch_size: timm's 'test_resnet' has no patches"),
        ("test_vit", {"patch_size": 5}, "patch_size: expected a divisor"),
        ("test_vit", {"patch_size": 0}, "patch_size: expected a divisor"),
        ("test_vit", {"small_stem": True}, "small_stem: timm's 'test_vit' has no convolutional stem"),
        ("gmlp_s16_224", {}, "patch_size: timm's 'gmlp_s16_224' has a fixed patch size"),
        ("levit_128s", {"image_size": 32}, "architecture: timm's 'levit_128s' does not take 32x32 images"),
        ("test_resnet", {"image_size": 0}, "image_size: expected"),
        ("test_resnet", {"num_classes": 0}, "num_classes: expected"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(architecture, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(architecture, **options)
    assert "\n" not in str(caught.value)


def test_the_plain_name_builds_too():
    assert isinstance(create_model("timm", architecture="test_resnet"), TimmModel)


def test_depth_width_and_heads_of_a_transformer_can_be_chosen():
    network = build("vit_tiny_patch16_224", image_size=32, depth=3, embed_dim=24, num_heads=4).network
    assert len(network.blocks) == 3 and network.blocks[0].attn.num_heads == 4
    assert network.pos_embed.shape == (1, 65, 24) and network.head.in_features == 24


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("resnet10t", {"depth": 3}, "depth: timm's 'resnet10t' has no such size to choose, got 3"),
        ("swin_tiny_patch4_window7_224", {"num_heads": 3}, "num_heads: .* has no such size to choose, got 3"),
        ("vit_tiny_patch16_224", {"depth": 0}, "depth: expected an integer of at least 1, got 0"),
        ("vit_tiny_patch16_224", {"embed_dim": 25}, "num_heads: expected a divisor of the embed_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(architecture, options, message):
    with pytest.raises(ConfigError, match=message):
        build(architecture, image_size=32, **options)


@pytest.mark.parametrize(
    ("architecture", "size", "features"),
    [
        ("test_vit", 32, 64),
        ("test_convnext", 32, 64),
        ("dla46_c", 32, 256),  # Its classifier is a convolution.
        ("efficientvit_m0", 224, 192),  # A norm and a linear layer.
    ],
)
def test_features_are_what_the_last_layer_is_given(architecture, size, features):
    model, images = build(architecture, image_size=size).eval(), torch.rand(2, 3, size, size)
    found = model.extract_features(images)
    assert found.shape == (2, features)
    assert torch.equal(model.classify(found), model(images))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_two_classifiers_have_no_features_in_common(architecture):
    model, images = build(architecture, image_size=224), torch.rand(1, 3, 224, 224)
    message = f"^model: timm's '{architecture}' does not end in one linear layer, so it has no features"
    with pytest.raises(ConfigError, match=message):
        model.extract_features(images)
    with pytest.raises(ConfigError, match=message):
        model.classify(torch.zeros(1, 8))
    assert model.components() == {}
