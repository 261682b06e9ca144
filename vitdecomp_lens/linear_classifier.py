"""A linear classifier of representations, fitted to its optimum."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = ["LinearClassifier"]

DECAY = 1e-3  # of linear probes


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of representations.

    Attributes:
        weight: A direction for each class.
        bias: What is added to its score.
    """

    weight: Float[Tensor, "class d_rep"]
    bias: Float[Tensor, "class"]

    @classmethod
    def fit(
        cls, features: Float[Tensor, "batch d_rep"], labels: Int[Tensor, "batch"], *, decay: float | int = DECAY
    ) -> "LinearClassifier":
        """Softmax regression on standardised features, with a penalty on squared weights, to its optimum (L-BFGS).

        Args:
            features: Representations.
            labels: The number of each one's class.
            decay: Half of it, times the sum of squared weights (of standardised features), is added to the mean loss.

        Example:
            >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
            >>> LinearClassifier.fit(x, torch.tensor([0, 0, 1, 1]))(x).argmax(1)
            tensor([0, 0, 1, 1])
        """
        mean, std = features.double().mean(0), features.double().std(0).clamp_min(1e-12)
        x, classes = (features.double() - mean) / std, int(labels.max()) + 1
        weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = functional.cross_entropy(x @ weight.T + bias, labels) + decay * weight.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        raw = (weight / std).detach()
        return cls(raw.to(features), (bias.detach() - raw @ mean).to(features))

    def __call__(self, features: Float[Tensor, "batch d_rep"]) -> Float[Tensor, "batch class"]:
        """The scores of the classes."""
        return features @ self.weight.T + self.bias
