"""The analysis of a run on texts: the parts of an analysis that apply to texts."""

from __future__ import annotations

from dataclasses import replace

from backdoorbench_moe.analysis import answers, carriers, latents
from backdoorbench_moe.analysis.analyzer import Analyzer
from backdoorbench_moe.analysis.results import Analysis, ImageCounts
from backdoorbench_moe.analysis.text_carriers import find_text_carriers
from backdoorbench_moe.data.text import RefusedQueries
from backdoorbench_moe.engine.measuring.consistency import check_same
from backdoorbench_moe.engine.measuring.texts import FIRST_TOKENS, TextPass, answer_metrics, pass_texts
from backdoorbench_moe.engine.opening.opened_run import OpenedRun
from backdoorbench_moe.moe.merging import MergedModel
from backdoorbench_moe.ops.seeding import seeded


class TextAnalyzer(Analyzer):
    """Computes the analysis of one run on texts."""

    def analyze(self) -> Analysis:
        """Compute all parts."""
        opened, other, texts = self.opened, self.other, self.opened.texts
        passed = self._pass(opened)
        self._check_record(passed)
        against = None if other is None else self._pass(other)
        found = self._new(ImageCounts(sum(map(len, passed.answers)), len(self.refused or ())))
        if opened.is_mixture:
            found = replace(found, experts=self._experts(passed, against), carriers=self._carriers())
        else:
            for part in ("experts", "carriers"):
                self._miss(
                    part, f"the model {opened.run.spec.model.name!r} is not a mixture of merged experts"
                )
        if self.refused is not None:
            found = replace(found, latents=self._latents(self._find_latents))
        with self._timed("answers"):
            examples = answers.example_answers(
                texts, self.numbers, self.refused, passed, against, opened.run.spec.seed
            )
        for part in ("patch maps", "routing", "capture", "shift", "pixels"):
            self._miss(part, "the data are texts, which have no patches, pixels or classes")
        return self._finished(replace(found, answers=examples))

    @property
    def numbers(self) -> range:
        """Numbers of the tasks that the run is measured on."""
        tasks = self.opened.tasks
        return range(len(self.opened.texts.tasks)) if tasks is None else tasks.numbers

    @property
    def refused(self) -> RefusedQueries | None:
        """Test queries that the policy refuses; None without a policy."""
        return self.opened.texts.refused_test if self.opened.run.spec.policy else None

    def _pass(self, opened: OpenedRun) -> TextPass:
        name = "queries" if opened is self.opened else "queries against"
        # The same draws, in the same order, as when the run was measured.
        with self._timed(name), seeded(self.opened.run.spec.seed, "measure"):
            return pass_texts(
                opened.model,
                self.opened.texts,
                self.numbers,
                self.refused,
                precision=self.opened.precision,
                mixture=self.opened.is_mixture,
            )

    def _check_record(self, found: TextPass) -> None:
        """Raise RecordError unless the run's model reproduces the BA and ASR of its record."""
        opened = self.opened
        metrics = answer_metrics(
            found,
            opened.texts,
            self.numbers,
            self.refused,
            attacked=opened.run.spec.attacked,
            mixture=opened.is_mixture,
        )
        check_same(opened.run, metrics, precision=opened.precision)

    def _find_latents(self, expert: int) -> latents.ExpertLatents:
        assert self.refused is not None
        kinds = {"marked": latents.Inputs.of(self.refused.harmful, FIRST_TOKENS)}
        return latents.find_latents(self.opened, self.other, kinds, expert)

    def _carriers(self) -> carriers.Carriers | None:
        if not isinstance(self.opened.model, MergedModel):
            name = self.opened.run.spec.model.name
            self._miss("carriers", f"the mixture of {name!r} does not list its experts (experts())")
            return None
        with self._timed("carriers"):
            return find_text_carriers(self.opened, self.refused, self.options.carriers_images)
