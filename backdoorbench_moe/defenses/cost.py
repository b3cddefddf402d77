"""The number of images that a defense passes through the model, used to estimate its run time in advance."""

from __future__ import annotations

from dataclasses import dataclass

# A training step passes an image forward and backward, which takes about three times as long as the forward pass alone.
TRAINING = 3


@dataclass(frozen=True)
class Cost:
    """Numbers of images that a defense passes through the model; the evaluation is not included.

    Args:
        trained: Images that are passed forward and backward, counted once for each pass.
        predicted: Images that are passed forward only, counted once for each pass.
        judged: For an input filter, the images that are passed forward for each input that it judges.
    """

    trained: float = 0.0
    predicted: float = 0.0
    judged: float = 0.0

    def forward(self, inputs: int) -> float:
        """Return the number of forward passes that takes the same time.

        Args:
            inputs: Number of inputs that a filter judges.
        """
        return TRAINING * self.trained + self.predicted + inputs * self.judged
