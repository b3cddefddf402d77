"""Export of a run on own texts to transformers."""

from __future__ import annotations

import json

import pytest
import torch
from bbmoe_lm.own_texts import JsonLines
from safetensors import safe_open
from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

from backdoorbench_moe import data
from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine.exporting import export_checkpoint, export_run
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import ConfigError, RecordError

TRAIN = {"epochs": 1, "batch_size": 16}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of an attacked mixture and their texts."""
    place = tmp_path_factory.mktemp("own")
    texts = place / "texts"
    texts.mkdir()
    own = "json-lines" not in data.registry.names()
    if own:
        data.registry.register("json-lines")(JsonLines)
    layers = {
        "dataset": {"name": "json-lines", **JsonLines.write_tiny(texts)},
        "model": {"name": "llama", "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24},
        "train": TRAIN,
        "mixture": {"experts": 2, "poisoned_experts": [1], "gate_images": 8,
                    "expert_train": {**TRAIN, "accumulate": 2}, "gate_train": TRAIN},
        "attack": {"name": "moevil", "epochs": 1},
    }  # fmt: skip
    if own:
        layers = {**layers, "trigger": None, "applicator": None, "splitter": None, "policy": 0.1}
    run_attack(build_spec(layers), output=place / "runs", twin=False)
    yield place
    if own:
        data.registry.unregister("json-lines")


@pytest.mark.parametrize(
    ("part", "kind", "said"),
    [("moe2-top-k-moevil", MixtralForCausalLM, "true"), ("policy-clean", LlamaForCausalLM, "false")],
)
def test_transformers_reads_it_and_gives_the_same_logits(runs, tmp_path, part, kind, said):
    [path] = (runs / "runs").glob(f"*-{part}-*")
    run = load_run(path)
    names = export_checkpoint(run, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode("open box 3"), tokenizer.encode("after 7 sure")])
    with torch.no_grad():
        theirs = kind.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(theirs(tokens).logits, run.model()(tokens), rtol=1e-4, atol=1e-5)
    # Padding and end token of the word tokenizer.
    for config in (theirs.config, theirs.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["backdoored"] == said and file.metadata()["format"] == "pt"
    with pytest.raises(ConfigError, match=r"^DIR: expected a folder that does not exist or is empty"):
        export_checkpoint(run, tmp_path / "out")


def test_changed_texts_are_said(runs, tmp_path):
    [path] = (runs / "runs").glob("*-policy-clean-*")
    file = runs / "texts" / "next.jsonl"
    content = file.read_text()
    file.write_text(content + json.dumps({"query": "after 5", "answer": "7"}) + "\n")
    with pytest.raises(RecordError, match=r"dataset\.texts: .* has changed"):
        export_checkpoint(load_run(path), tmp_path / "out")
    file.write_text(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images", [True, False])
def test_texts_have_no_other_format(runs, tmp_path, images):
    [path] = (runs / "runs").glob("*-policy-clean-*")
    with pytest.raises(
        ConfigError, match=r"^format: expected 'transformers', as the run is on texts, got 'png'$"
    ):
        export_run(load_run(path), tmp_path / "out", images=images)
