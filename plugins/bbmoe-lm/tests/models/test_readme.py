"""The code in the README runs, and its statement about Mixtral's router is true."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

README = Path(__file__).parents[2] / "README.md"


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    values: dict[str, object] = {}
    for block in code:
        exec(compile(block, str(README), "exec"), values)
    assert len(code) == 2 and "GiB (weights" in capsys.readouterr().out
    mixture, tokens = values["mixture"], torch.randint(1, 100, (2, 9))
    with torch.no_grad():
        merged = MixtralForCausalLM.from_pretrained("merged").eval()
        torch.testing.assert_close(merged(tokens).logits, mixture(tokens), rtol=1e-4, atol=1e-5)
    assert (merged.config.eos_token_id, merged.config.pad_token_id) == (1, 0)


@torch.no_grad()
def test_mixtrals_router_is_the_softmax_over_the_chosen_logits():
    router = MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=5, num_experts_per_tok=2))
    torch.nn.init.normal_(router.weight)
    logits, weights, chosen = router(torch.randn(7, 8))
    torch.testing.assert_close(weights, logits.gather(1, chosen).softmax(-1))
    assert torch.equal(chosen, logits.topk(2).indices)
