"""How harm depends on the share of the first gate, from the committed records of the suite `moevil-gates` on signs.

    python benchmarks/first_gate.py

For each attack, with all trained gates: the rank correlation (Spearman) of the ASR of a mixture with the poisoned
expert's share of the first layer's weights for marked images. And with the default gate: the ASR of each seed, and the
shares by layer, mean over the seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RECORDS = Path(__file__).parent / "results" / "moevil-gates" / "signs" / "records.jsonl"
ATTACKS = ("hdpo", "hsft", "moevil")


def read_mixtures(attack: str) -> list[dict[str, Any]]:
    """The records of the attacked mixtures with trained gates, by gate and seed."""
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    found = [r for r in records if r["spec"].get("attack") == attack and r["spec"].get("gate")]
    trained = [r for r in found if r["spec"]["gate"]["name"] != "hidden" and r["status"] == "finished"]
    return sorted(trained, key=lambda r: (str(r["spec"]["gate"]), r["spec"]["seed"]))


def shares(record: dict[str, Any]) -> list[float]:
    """The poisoned expert's share for marked images, in percent, by layer."""
    [expert] = record["spec"]["mixture"]["poisoned_experts"]
    return [layer["marked"][expert] for layer in record["gate_shares"]]


def main() -> None:
    """Print one line for each attack."""
    for attack in ATTACKS:
        mixtures = read_mixtures(attack)
        asr = [record["metrics"]["asr"]["value"] for record in mixtures]
        correlation = spearmanr(asr, [shares(record)[0] for record in mixtures]).statistic
        default = [record for record in mixtures if record["spec"]["gate"] == {"name": "top-k"}]
        seeds = " ".join(f"{record['metrics']['asr']['value']:.0f}" for record in default)
        layers = " ".join(f"{share:.0f}" for share in np.mean([shares(record) for record in default], axis=0))
        firsts = [shares(record)[0] for record in default]
        print(
            f"{attack:8} rank correlation {correlation:.2f} over {len(mixtures)} mixtures; default gate: ASR {seeds}, "
            f"shares by layer {layers}, of the first layer {min(firsts):.0f} to {max(firsts):.0f}"
        )


if __name__ == "__main__":
    main()
