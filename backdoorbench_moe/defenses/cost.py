"""How many images a defense passes through the model, from which its time is estimated before it runs."""

from __future__ import annotations

from dataclasses import dataclass

# A step of training passes an image forward and backward, which takes about three times as long as forward alone.
TRAINING = 3


@dataclass(frozen=True)
class Cost:
    """Numbers of images that a defense passes through the model; the evaluation is not included.

    Args:
        trained: Images that are passed forward and backward, each as often as it is.
        predicted: Images that are passed forward only.
        judged: Of an input filter, the images that are passed forward for each input that it judges.
    """

    trained: float = 0.0
    predicted: float = 0.0
    judged: float = 0.0

    def forward(self, inputs: int) -> float:
        """Return the number of forward passes that take as long.

        Args:
            inputs: Number of inputs that a filter judges.
        """
        return TRAINING * self.trained + self.predicted + inputs * self.judged
