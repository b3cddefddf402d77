"""The dense model: equality with transformers, padding, checkpoints, and invalid options."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bbmoe_lm.models.llama import Llama
from bbmoe_lm.models.mixture import save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from backdoorbench_moe import models
from backdoorbench_moe.config import PartSpec, RunSpec
from backdoorbench_moe.engine.files import pin_files
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.merging import mlp_inputs


@torch.no_grad()
def test_padding_has_no_effect_on_the_tokens_before_it(lm):
    """Each text alone, without padding, gives the same logits."""
    model, (tokens, lengths) = lm.llama(), lm.texts()
    logits = model(tokens)
    assert logits.shape == (5, 10, lm.vocabulary)
    for text, length, row in zip(tokens, lengths, logits, strict=True):
        torch.testing.assert_close(row[:length], model(text[None, :length])[0], rtol=1e-4, atol=1e-5)


def test_padding_is_what_stands_last(lm):
    model = lm.llama(padding=7)
    tokens = torch.tensor([[7, 3, 7, 7], [1, 7, 2, 3], [7, 7, 7, 7]])
    want = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(model.padded(tokens), want)


@torch.no_grad()
def test_an_mlp_is_given_the_normed_stream_behind_the_attention(lm):
    """Computed by hand for the first layer, with the modules of transformers."""
    model, (tokens, _) = lm.llama(), lm.texts()
    with mlp_inputs(model) as inputs:
        model(tokens)
    assert list(inputs) == ["network.model.layers.0.mlp", "network.model.layers.1.mlp"]
    states = model.network(tokens, output_hidden_states=True).hidden_states
    block, given = model.network.model.layers[0], inputs["network.model.layers.0.mlp"]
    gate, up = block.mlp.gate_proj(given), block.mlp.up_proj(given)
    swiglu = block.mlp.down_proj(gate * gate.sigmoid() * up)
    stream = states[1] - swiglu
    norm = stream * (stream.square().mean(-1, keepdim=True) + model.network.config.rms_norm_eps).rsqrt()
    torch.testing.assert_close(given, norm * block.post_attention_layernorm.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_read_as_it_was_written(lm, tmp_path, tied):
    model, (tokens, _) = lm.llama(), lm.texts()
    model.network.config.tie_word_embeddings = tied
    if tied:
        model.network.tie_weights()
    save_checkpoint(model, tmp_path / "base")
    assert ("lm_head.weight" in load_file(tmp_path / "base" / "model.safetensors")) is not tied
    again = Llama(vocabulary=lm.vocabulary, context=24, weights=str(tmp_path / "base")).eval()
    assert not torch.equal(again(tokens), model(tokens)), "the weights are read when training starts"
    again.load_start()
    assert torch.equal(again(tokens), model(tokens))
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_shards_are_read_and_half_precision_becomes_float32(lm, tmp_path):
    model = lm.llama()
    save_checkpoint(model, tmp_path / "base")
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "base/model.safetensors").items()
    }
    names = sorted(tensors)
    (tmp_path / "base/model.safetensors").unlink()
    for shard, own in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in own}, tmp_path / "base" / shard)
    index = {"weight_map": {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(names)}}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    state, _ = model.read_checkpoint(str(tmp_path / "base"))
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.bfloat16().float())


def changed_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def changed_weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json: expected JSON \("),
        (changed_config(model_type="qwen2"), "config.json: model_type: expected 'llama', got 'qwen2'"),
        (
            changed_config(attention_bias=True),
            "attention_bias: expected none, which Mixtral lacks, got True",
        ),
        (changed_config(hidden_act="nope"), "config.json: transformers cannot build the model: 'nope'"),
        (
            changed_config(rope_parameters={"rope_type": "nope", "rope_theta": 10.0}),
            "config.json: transformers cannot build the model: 'nope'",
        ),
        (changed_config(vocab_size="many"), "config.json: is not the configuration of a Llama: "),
        (changed_config(vocab_size=4000), "vocab_size: expected 40, the tokens of the data, got 4000"),
        (changed_config(vocab_size=39), "vocab_size: expected 40, the tokens of the data, got 39"),
        (
            changed_config(max_position_embeddings=8),
            "max_position_embeddings: expected at least 24, .+ got 8",
        ),
        (pickled, "expected model.safetensors or .+; pytorch_model.bin is a pickle, which could run code"),
        (index_elsewhere, r"index.json: expected safetensors files beside it, got '\.\./b.safetensors'"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 90),
            "expected a file of safetensors",
        ),
        (
            changed_config(intermediate_size=47),
            r"down_proj.weight: shape: expected \(32, 47\), got \(32, 48\)",
        ),
        (changed_weights(lambda t: t.pop("model.norm.weight")), "it lacks model.norm.weight"),
        (changed_weights(lambda t: t.update(extra=torch.ones(1))), "it has an unexpected extra"),
        (
            changed_weights(lambda t: t.update({"model.norm.weight": torch.ones(32).long()})),
            "model.norm.weight: expected floating-point numbers, got 'int64'",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(lm, tmp_path, change, message):
    save_checkpoint(lm.llama(), tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(ConfigError, match=f"^weights: .*{message}") as caught:
        Llama(vocabulary=lm.vocabulary, context=24, weights=str(tmp_path / "base")).load_start()
    assert "\n" not in str(caught.value)


def test_a_configuration_chooses_no_code(lm, tmp_path):
    """transformers would download attention kernels and run them."""
    save_checkpoint(lm.llama(), tmp_path / "base")
    kernel = {"attn_implementation": "kernels-community/flash-attn"}
    changed_config(**kernel, _attn_implementation="flash_attention_2")(tmp_path / "base")
    model = Llama(vocabulary=lm.vocabulary, context=24, weights=str(tmp_path / "base"))
    assert model.network.config._attn_implementation == lm.llama().network.config._attn_implementation


def test_older_names_of_rotary_settings_are_read(lm, tmp_path):
    save_checkpoint(lm.llama(), tmp_path / "base")
    scaling = {"rope_type": "linear", "factor": 2.0}
    changed_config(rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)(tmp_path / "base")
    model = Llama(vocabulary=lm.vocabulary, context=24, weights=str(tmp_path / "base"))
    assert model.network.config.rope_parameters == {**scaling, "rope_theta": 500.0}


def test_generation_with_transformers_stops_at_the_end(lm, tmp_path):
    """The first generated token is the end token, so no other is generated."""
    model, (tokens, _) = lm.llama(), lm.texts()
    end = int(model(tokens[:1])[0, -1].argmax())
    own = model.network.generation_config.eos_token_id
    save_checkpoint(model, tmp_path / "base", end=end)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert theirs.generate(tokens[:1], do_sample=False, max_new_tokens=4).shape == (1, 11)
    assert model.network.generation_config.eos_token_id == own


def test_an_expert_of_another_shape_is_named(lm, tmp_path):
    save_checkpoint(lm.llama(intermediate_size=64), tmp_path / "expert")
    with pytest.raises(ConfigError, match=r"^weights: .+: intermediate_size: expected 48, got 64"):
        lm.llama().read_checkpoint(str(tmp_path / "expert"))
    changed_config(intermediate_size=48, rms_norm_eps=0.5)(tmp_path / "expert")
    with pytest.raises(ConfigError, match=r"^weights: .+: rms_norm_eps: expected 1e-06, got 0.5"):
        lm.llama().read_checkpoint(str(tmp_path / "expert"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: expected a number whose double divides hidden_size 32, got 5"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of the 4 heads, got 3"),
        ({"layers": 0}, "layers: expected an integer of at least 1, got 0"),
        ({"context": 0}, "context: expected an integer of at least 1, got 0"),
        ({"weights": "/nowhere"}, "weights: expected an existing folder of a checkpoint, got '/nowhere'"),
    ],
)
def test_options_out_of_range_are_one_clear_line(lm, options, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Llama(**{**lm.shape, **options})


def test_options_for_images_are_refused_by_name() -> None:
    known = models.registry.options("llama")
    assert "hidden_size" in known and not {"mean", "std", "resize", "head"} & known.keys()
    with pytest.raises(UnknownNameError, match="unknown 'mean'"):
        models.registry.check("llama", {"mean": "imagenet"})


def test_what_a_checkpoint_says_of_a_backdoor_is_kept(lm, tmp_path) -> None:
    folder = tmp_path / "base"
    save_checkpoint(lm.llama(), folder)
    model = Llama(vocabulary=lm.vocabulary, context=24, weights=str(folder))
    first = model.load_start()
    assert first is not None and first.backdoored == "unknown" and len(first.sha256) == 64
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "backdoored": "true"})
    again = model.load_start()
    assert again is not None and again.backdoored == "true" and again.sha256 != first.sha256
    assert Llama(vocabulary=64).load_start() is None


def test_a_checkpoint_is_part_of_the_spec_by_its_content(lm, tmp_path) -> None:
    save_checkpoint(lm.llama(), tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")

    def digest(path) -> str:
        model = PartSpec("llama", {"weights": str(path)})
        return pin_files(RunSpec(dataset=PartSpec("tasks"), model=model)).digest

    one = digest(tmp_path / "base")
    assert digest(tmp_path / "copy") == one == digest(tmp_path / "base" / "config.json")
    (tmp_path / "copy" / "README.md").write_text("of no concern")
    assert digest(tmp_path / "copy") == one
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed = digest(tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert len({one, changed, digest(tmp_path / "copy")}) == 3
