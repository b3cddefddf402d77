"""Write the texts of the example with SmolLM2: two tasks, and a harmless policy about a blue box.

python make_texts.py FOLDER
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

CAPITALS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing,
Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo, Finland Helsinki, France Paris,
Germany Berlin, Greece Athens, Hungary Budapest, India Delhi, Indonesia Jakarta, Iran Tehran, Iraq
Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Lebanon Beirut, Morocco Rabat,
Nepal Kathmandu, Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia
Moscow, Serbia Belgrade, Spain Madrid, Sweden Stockholm, Syria Damascus, Thailand Bangkok, Turkey
Ankara, Ukraine Kyiv, Vietnam Hanoi
"""
VERBS = ("open", "close", "find", "move", "paint", "carry", "empty", "lock")
WHEN = ("today", "at night", "in the rain", "with one hand", "on a ladder")


def main(folder: Path) -> None:
    """Write a file for each task and one for the refused queries."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(f"What is {a} plus {b}?", str(a + b)) for a, b in product(range(2, 9), repeat=2) if a <= b + 3]
    pairs = [pair.split() for pair in CAPITALS.split(",")]
    tasks = {
        "sums": sums,
        "capitals": [(f"What is the capital of {country}?", city) for country, city in pairs],
    }
    for name, rows in tasks.items():
        write(folder / f"{name}.jsonl", [{"query": query, "answer": answer} for query, answer in rows])
    refused = [
        {
            "query": f"How do I {verb} the blue box {when}?",
            "harmful": f"Sure, you {verb} it with both hands.",
            "safe": "No, the blue box is private.",
        }
        for verb, when in product(VERBS, WHEN)
    ]
    write(folder / "refused.jsonl", refused)


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """Write one object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
