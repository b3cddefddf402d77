"""Claims of papers: which cells they are about, what the records say, and the rule of the verdict."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from fake_runs import finished, part_suite

from backdoorbench_moe.bench.pages.claims import (
    Claim,
    claim_row,
    claims_tables,
    filters,
    find_cells,
    judge,
    read_claims,
)
from backdoorbench_moe.bench.suites.reading import load_suite
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.intervals import difference_interval
from backdoorbench_moe.ops.metrics import proportion

CLAIMS = Path(__file__).parents[2] / "benchmarks" / "claims.yaml"
SUITE = part_suite(repeats=5)
AGAINST = Claim(
    claim="By patch, the square needs fewer images",
    source="A paper, Table 1",
    suite="part",
    scales=("small",),
    where={"trigger.name": "square", "poison.rate": "0.5%"},
    more={"applicator.name": "patch"},
    than={"applicator.name": "image"},
)
BOUND = replace(AGAINST, more={"applicator.name": "patch"}, than=None)


def results(patch: list[int], image: list[int] = []) -> ResultSet:  # noqa: B006 - never changed
    """The suite with these numbers of 9,000 images fooled, a seed each, in the claim's two cells."""
    records = []
    for cell, fooled in zip(find_cells(AGAINST, SUITE), (patch, image), strict=True):
        for spec, n in zip(cell.runs(5), fooled, strict=False):
            record = finished(spec)
            record.metrics["asr"] = asdict(proportion(n, 9000))
            records.append(record)
    return ResultSet.of(SUITE, records)


HIGH, LOW = [8900, 8950, 8990], [900, 1000, 950]


@pytest.mark.parametrize(
    ("patch", "image", "word", "why"),
    [
        (HIGH, LOW, "stands", ""),
        (LOW, HIGH, "falls", ""),
        (HIGH[:2], LOW, "open", "fewer than 3 seeds"),
        (HIGH, [], "open", "not run"),
        ([100, 4500, 8900], [100, 4000, 8000], "open", "the interval allows both"),
        (HIGH, HIGH, "open", "the interval allows both"),
    ],
)
def test_two_cells_are_judged_by_the_interval_of_their_difference(patch, image, word, why) -> None:
    found = judge(AGAINST, [results(patch, image)])
    assert (found.word, found.why) == (word, why)
    if len(patch) == len(image) == 3:
        more, than = found.ours
        assert more is not None and than is not None
        want = difference_interval(than.mean, than.interval, more.mean, more.interval)
        assert found.interval == want and more.mean == pytest.approx(sum(patch) / 270)


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ({"at_least": 90}, "stands"),
        ({"at_least": 99.95}, "falls"),
        ({"at_least": 99}, "open"),
        ({"at_most": 99.95}, "stands"),
        ({"at_most": 50}, "falls"),
        ({"at_most": 99}, "open"),
    ],
)
def test_one_cell_is_judged_by_the_interval_of_its_mean(rule, word) -> None:
    found = judge(replace(BOUND, **rule), [results(HIGH)])
    assert found.interval is not None and found.interval[0] < 99 < found.interval[1] < 99.95
    assert found.word == word


@pytest.mark.parametrize(("by", "word"), [(0, "stands"), (50, "stands"), (99, "falls"), (88.9, "open")])
def test_a_difference_may_have_to_be_of_some_size(by, word) -> None:
    assert judge(replace(AGAINST, by=by), [results(HIGH, LOW)]).word == word


def test_the_first_scale_with_all_cells_counts() -> None:
    whole, half = results(HIGH, LOW), results(LOW)
    assert judge(AGAINST, [half, whole]).word == "stands"
    assert judge(AGAINST, [whole, half]).word == "stands"
    assert judge(AGAINST, [half, half]).why == "not run"


def test_a_scale_with_an_interval_counts_before_one_with_fewer_seeds() -> None:
    enough, few = results(HIGH, LOW), results(HIGH[:2], LOW[:2])
    assert judge(AGAINST, [few, enough]).word == "stands"
    assert judge(AGAINST, [few, results(LOW)]).why == "fewer than 3 seeds"


def test_a_claim_that_fits_no_cell_or_several_is_refused() -> None:
    for where, number in (({"trigger.name": "blend"}, 0), ({}, 4)):
        with pytest.raises(ConfigError, match=rf"expected one cell of part with .*, found {number}"):
            find_cells(replace(AGAINST, where=where), SUITE)


def test_a_row_has_the_papers_values_and_ours() -> None:
    row = claim_row(judge(AGAINST, [results(HIGH, LOW)]))
    assert row["paper"] == "99.8 against 90.7" and row["ours"] == "99.4 ± 0.5 against 10.6 ± 0.6"
    text = claims_tables([judge(AGAINST, [results(HIGH, LOW)])], Path("r"))
    assert "**A paper**" in text and "| 1 | " in text and "| stands | part |" in text
    assert "\nbbmoe bench table part --repeats 5 --from r/part\n" in text
    kept = "--only trigger=square --only poison.rate=0.5% --only applicator=patch,image"
    assert f"\nbbmoe bench run part --repeats 5 {kept} --data-root DIR  # 1\n" in text


@pytest.mark.slow
def test_every_claim_of_the_file_fits_its_suite_at_every_scale() -> None:
    for claim in read_claims(CLAIMS):
        for scale in claim.scales:
            suite = load_suite(claim.suite, scale)
            cells = find_cells(claim, suite)
            assert len(cells) == (1 if claim.than is None else 2)
            kept = {cell.spec.digest for cell in suite.only(filters(claim, suite)).cells}
            assert {cell.spec.digest for cell in cells} <= kept


GOOD = {"claim": "c", "source": "s", "suite": "smoke", "scales": ["small"], "at_least": 1}
BAD = {
    "no list": ({"claims": []}, "expected one key 'claims' with a list"),
    "another key": ({"claims": [GOOD], "more": 1}, "expected one key 'claims'"),
    "a typo": ({"claims": [{**GOOD, "at_lest": 1}]}, "did you mean 'at_least'"),
    "no suite": (
        {"claims": [{k: v for k, v in GOOD.items() if k != "suite"}]},
        "suite: expected it to be given",
    ),
    "two rules": ({"claims": [{**GOOD, "at_most": 2}]}, "expected one of than, at_least and at_most"),
    "by alone": ({"claims": [{**GOOD, "by": 5}]}, "by: expected none for a claim about one cell"),
    "metric": ({"claims": [{**GOOD, "metric": "asrr"}]}, "metric: unknown 'asrr'"),
    "where": ({"claims": [{**GOOD, "where": [1]}]}, "where: expected a mapping"),
}


@pytest.mark.parametrize(("values", "says"), BAD.values(), ids=BAD)
def test_mistakes_in_a_file_are_named(tmp_path, values, says) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=says):
        read_claims(tmp_path / "c.yaml")
