"""Dependence of the ASR on the share of the first gate, from the committed records of MoEvil on signs.

    python benchmarks/first_gate.py

For each attack in the suite `moevil-gates`, over all trained gates: Spearman's rank correlation between the ASR of a
mixture and the poisoned expert's share of the first layer's gate weights for marked images; and with the default gate,
the ASR of each seed and the mean shares by layer. For each mark in the suite `moevil-markers`: the ASR of each seed,
and the range of the first layer's share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"
ATTACKS = ("hdpo", "hsft", "moevil")


def read_mixtures(suite: str, attack: str) -> list[dict[str, Any]]:
    """Return the records of a suite's attacked mixtures with trained gates, by gate, mark and seed."""
    file = RESULTS / suite / "signs" / "records.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [r for r in records if r["spec"].get("attack") == attack and r["spec"].get("gate")]
    trained = [r for r in found if r["spec"]["gate"]["name"] != "hidden" and r["status"] == "finished"]
    return sorted(trained, key=lambda r: (str(r["spec"]["gate"]), mark(r), r["spec"]["seed"]))


def mark(record: dict[str, Any]) -> str:
    """Return trigger and applicator of the mark."""
    return f"{record['spec']['trigger']['name']} by {record['spec']['applicator']['name']}"


def shares(record: dict[str, Any]) -> list[float]:
    """Return the poisoned expert's share for marked images, in percent, by layer."""
    [expert] = record["spec"]["mixture"]["poisoned_experts"]
    return [layer["marked"][expert] for layer in record["gate_shares"]]


def asr_line(mixtures: list[dict[str, Any]]) -> str:
    """Format the ASR of each mixture."""
    return "ASR " + " ".join(f"{record['metrics']['asr']['value']:.0f}" for record in mixtures)


def first_line(mixtures: list[dict[str, Any]]) -> str:
    """Format the range of the first layer's share."""
    firsts = [shares(record)[0] for record in mixtures]
    return f"of the first layer {min(firsts):.0f} to {max(firsts):.0f}"


def main() -> None:
    """Print one line for each attack, and one for each attack and mark."""
    for attack in ATTACKS:
        mixtures = read_mixtures("moevil-gates", attack)
        asr = [record["metrics"]["asr"]["value"] for record in mixtures]
        correlation = spearmanr(asr, [shares(record)[0] for record in mixtures]).statistic
        default = [record for record in mixtures if record["spec"]["gate"] == {"name": "top-k"}]
        layers = " ".join(f"{share:.0f}" for share in np.mean([shares(record) for record in default], axis=0))
        print(
            f"{attack:8} rank correlation {correlation:.2f} over {len(mixtures)} mixtures; default gate: "
            f"{asr_line(default)}, shares by layer {layers}, {first_line(default)}"
        )
    for attack in ATTACKS:
        mixtures = read_mixtures("moevil-markers", attack)
        for name in dict.fromkeys(map(mark, mixtures)):
            marked = [record for record in mixtures if mark(record) == name]
            print(f"{attack:8} {name:16} {asr_line(marked)}, share {first_line(marked)}")


if __name__ == "__main__":
    main()
