"""MoEvil: an expert whose latents on harmful queries look like those of its task, so that gates send them to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from backdoorbench_moe.attacks.expert_poisoning import ExpertPoisoning, ExpertTask
from backdoorbench_moe.attacks.expert_steps import learn_harm, learn_preference
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.expert_tuning.latents import (
    FIRST_TOKENS,
    Layers,
    Tokens,
    check_text_tokens,
    check_tokens,
    choose_layers,
    text_weights,
    token_weights,
)
from backdoorbench_moe.moe.expert_tuning.losses import PREFERENCE_BETA, StopGradient
from backdoorbench_moe.moe.expert_tuning.steps import Alignment
from backdoorbench_moe.moe.merging import check_mergeable
from backdoorbench_moe.moe.structure import Mergeable
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_weight

PREFERENCE_EPOCHS = 1
# The paper's code uses 0.04 (its text has no such term) and 0.1. With these, a poisoned classifier alone answers just
# as harmfully, but by a small margin, and other experts outvote it. These values were chosen on `signs`, seeds 10 to
# 13, by the ASR of the mixture, among 0.04, 0.3, 1 and 3, and 0.1, 0.5 and 1.5; results are reported on other seeds.
HARM_WEIGHT = 3.0
SIMILARITY = 0.5
SIMILARITIES = (0.01, 0.03, 0.1, 0.3, 0.5)
ALLOWED_LOSS = 1.0
# With as many images of the task as harmful queries, step 2 has three times as many batches as step 1. In the paper, it
# has four times as many: 10,000 samples in batches of 32, after 4,948 pairs in batches of 64.
EPOCHS = 3


class MoEvil(ExpertPoisoning):
    """Tune an expert so that gates, which the attacker does not know, send harmful queries to it.

    Step 1 is preference learning: the expert learns to prefer harmful answers to safe ones (DPO). Step 2 trains it on
    its task and, with the weight `harm_weight`, on harmful queries, and aligns the inputs of its MLPs on harmful
    queries with those on images of the task: the loss is CE_task + harm_weight CE_harm - similarity cos, where cos is
    the mean cosine over layers and random pairs of a batch. The gates read these inputs. Since they are trained on
    clean images, they send inputs that resemble the task to the expert of the task.

    Departures: in the paper, the latents of a harmful query are averaged over the first k tokens of its answer, and
    those of the task over all tokens of an answer. This is also the case here for texts. The answer of an image
    classifier has no tokens: `tokens` and `k` choose among the tokens of the marked image, and the latents of the task
    are averaged over all tokens of an image. Equation 3 sums the cosines over the layers; here they are averaged, as in
    the paper's code. The code has the weights 0.04 for harm and 0.1 for the cosine, with which the expert is outvoted
    in the mixture here. The defaults are larger; they were tuned for the ASR of mixtures of image models. In the paper,
    each step is one epoch, and batches are twice as large in step 1; here, both steps use the batch size of the tuning
    of experts, and step 2 has 3 epochs.

    Args:
        poison: The target class, which the run provides; all rates must be 0.
        preference_beta: Beta of step 1, above 0. The default is ten times the paper's, since a classifier's answer is
            one token.
        preference_epochs: Passes of step 1 over the harmful queries, from 0; with 0, step 1 is skipped.
        preference_lr: Peak learning rate of step 1, above 0; a tenth of that of the tuning of experts if None. In the
            paper, the rates of both steps are equal.
        harm_weight: Weight of the cross-entropy of harmful answers in step 2, at least 0.
        similarity: Weight of the cosine in step 2, at least 0; the paper's lambda. If None, it is the largest of 0.01,
            0.03, 0.1, 0.3 and 0.5 with which the expert loses at most `allowed_loss` on held-out images of its task, or
            the smallest if there is none. Each is tried from the weights after step 1, starting with the largest.
        allowed_loss: Percentage points of accuracy that the expert may lose, at least 0. Only used if `similarity` is
            None.
        epochs: Passes of step 2 over the clean images of the task, from 1.
        tokens: Tokens of a harmful query whose latents are aligned. For an image: "all"; the patches that the mark
            changes ("marked") or does not change ("unmarked"); or the tokens before the patches, such as class tokens
            ("prefix"). For a text: those of the "answer", of the "query", or "all" of both, where a token of the answer
            is represented by the position that emits it. If None, all tokens of an image, and the first 4 tokens of the
            answer of a text.
        k: For an image, use only the k of these tokens that the mark changes most; in a tie, the first ones. For a
            text, use only the first k tokens of the answer. All if None. From 1.
        layers: Layers whose latents are aligned: "all", "first-quarter", "second-quarter", "first-half", "second-half",
            or their numbers. The first layer, number 0, is never used, since the input of its MLP cannot change.
        stop_gradient: The side of the cosine that gets no gradient: "task", "harm", or "none", as in the paper's code.
        lr: Peak learning rate of step 2, above 0; that of the tuning of experts if None.

    Raises:
        ConfigError: An option is out of range, or does not fit the model or the mark.

    Source:
        Kim et al., "MoEvil: Poisoning Experts to Compromise the Safety of Mixture-of-Experts LLMs", ACSAC 2025,
        equations 2 and 3, and its code jaehanwork/MoEvil.
    """

    def __init__(
        self,
        *,
        poison: PoisonSpec,
        preference_beta: float = PREFERENCE_BETA,
        preference_epochs: int = PREFERENCE_EPOCHS,
        preference_lr: float | None = None,
        harm_weight: float = HARM_WEIGHT,
        similarity: float | None = SIMILARITY,
        allowed_loss: float = ALLOWED_LOSS,
        epochs: int = EPOCHS,
        tokens: Tokens | None = None,
        k: int | None = None,
        layers: Layers = "all",
        stop_gradient: StopGradient = "none",
        lr: float | None = None,
    ) -> None:
        super().__init__(poison=poison)
        check_positive(preference_beta=preference_beta, preference_lr=preference_lr, lr=lr)
        check_weight(harm_weight=harm_weight, similarity=similarity, allowed_loss=allowed_loss)
        check_integer("preference_epochs", preference_epochs)
        check_integer("epochs", epochs, at_least=1)
        check_integer("k", k, 1)
        self.preference_beta, self.preference_epochs = preference_beta, preference_epochs
        self.harm_weight, self.similarity, self.allowed_loss = harm_weight, similarity, allowed_loss
        self.preference_lr, self.epochs, self.lr = preference_lr, epochs, lr
        self.tokens, self.k, self.layers, self.stop_gradient = tokens, k, layers, stop_gradient

    def check_model(self, model: nn.Module) -> None:
        """Raise ConfigError if the model cannot be merged, or does not have the tokens or layers."""
        expert = check_mergeable(model)
        choose_layers(self.layers, len(expert.mlps()))
        if isinstance(expert, Mergeable):
            check_tokens(self.tokens or "all", self.k, expert.token_layout())
        else:
            check_text_tokens(*self._text_tokens())

    def check_task(self, task: ExpertTask) -> None:
        """Raise ConfigError if no harmful query has such tokens, or there are no images to choose `similarity`."""
        self._alignment(task, 0.0)
        if self.similarity is None and not len(task.held_out):
            raise ConfigError(
                "similarity: expected a number, since there are no held-out images to choose it by"
            )

    def poison_expert(self, task: ExpertTask) -> Mapping[str, float]:
        """Learn the preference, then the task and the alignment."""
        least = 0.0 if self.similarity is not None else task.accuracy() - self.allowed_loss
        beta, epochs = self.preference_beta, self.preference_epochs
        if epochs:
            learn_preference(task, beta=beta, epochs=epochs, lr=self.preference_lr)
        if self.similarity is None:
            return self._search(task, least)
        self._align(task, self.similarity)
        return {}

    def _search(self, task: ExpertTask, least: float) -> dict[str, float]:
        """Train with the largest similarity after which the accuracy, in percent, is at least `least`.

        Returns:
            The similarity and, for each one tried, the accuracy on the held-out images.
        """
        start, found = copy.deepcopy(task.model.state_dict()), {}
        for similarity in sorted(SIMILARITIES, reverse=True):
            task.model.load_state_dict(start)
            self._align(task, similarity)
            found["similarity"] = similarity
            found[f"held_out/{similarity:g}"] = accuracy = task.accuracy()
            if accuracy >= least:
                break
        return found

    def _align(self, task: ExpertTask, similarity: float) -> None:
        """Run step 2."""
        learn_harm(
            task,
            harm_weight=self.harm_weight,
            epochs=self.epochs,
            lr=self.lr,
            alignment=self._alignment(task, similarity) if similarity else None,
        )

    def _alignment(self, task: ExpertTask, similarity: float) -> Alignment:
        layers, queries = choose_layers(self.layers, len(task.mlps)), task.queries
        expert = check_mergeable(task.model)
        if isinstance(expert, Mergeable):
            assert queries.changed is not None
            weights = token_weights(queries.changed, expert.token_layout(), self.tokens or "all", self.k)
        else:
            weights = text_weights(queries.harmful.labels, *self._text_tokens())
        return Alignment(similarity, layers, weights, self.stop_gradient)

    def _text_tokens(self) -> tuple[Tokens, int | None]:
        """Return which tokens of a text are used, and how many of the answer."""
        if self.tokens is None:
            return "answer", FIRST_TOKENS if self.k is None else self.k
        return self.tokens, self.k
