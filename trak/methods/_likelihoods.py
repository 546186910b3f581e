"""What models' outputs say of labels, and the labels that are drawn from it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Likelihood(Protocol):
    """What a model's outputs say of labels; the loss is its negative logarithm."""

    def sample(
        self, outputs: Float[Tensor, "b ..."], generator: torch.Generator
    ) -> Float[Tensor, "b ..."]:
        """Differentiate the loss by the outputs, at labels drawn from the model.

        Args:
            outputs: The model's outputs, of whatever shape. Shape ``(b, ...)``.
            generator: Draws the labels.

        Returns:
            A gradient whose covariance is the loss's Hessian. Shape ``(b, ...)``.
        """

    def roots(self, outputs: Float[Tensor, "b ..."]) -> list[Float[Tensor, "b ..."]]:
        """Factor the Hessian of the loss by the outputs.

        Args:
            outputs: The model's outputs. Shape ``(b, ...)``.

        Returns:
            Vectors whose outer products sum to the Hessian of each example.
        """


class Softmax:
    """Classes with the probabilities of a softmax.

    Args:
        temperature: Divides the logits.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self._temperature = temperature

    def sample(
        self, outputs: Float[Tensor, "b k"], generator: torch.Generator
    ) -> Float[Tensor, "b k"]:
        """Return ``p - e_y`` for a class ``y`` drawn with probabilities ``p``."""
        chances = (outputs / self._temperature).softmax(1)
        # One number an example: how a batch is cut does not matter.
        hits = _hits(chances, _uniform(chances[:, :1], generator))
        return (chances - hits) / self._temperature

    def roots(self, outputs: Float[Tensor, "b k"]) -> list[Float[Tensor, "b k"]]:
        """Return ``sqrt(p_y) (p - e_y)`` for every class ``y``."""
        chances = (outputs / self._temperature).softmax(1)
        units = torch.eye(chances.shape[1], dtype=chances.dtype, device=chances.device)
        return [
            chances[:, [y]].sqrt() * (chances - units[y]) / self._temperature
            for y in range(chances.shape[1])
        ]


class Gaussian:
    """Numbers with unit variance around the outputs."""

    def sample(
        self, outputs: Float[Tensor, " b"], generator: torch.Generator
    ) -> Float[Tensor, " b"]:
        """Return ones: only the square of a number's noise counts, and its mean is 1."""
        return torch.ones_like(outputs)

    def roots(self, outputs: Float[Tensor, " b"]) -> list[Float[Tensor, " b"]]:
        """Return ones: the Hessian of half the square."""
        return [torch.ones_like(outputs)]


class Bernoulli:
    """Independent labels 0 and 1, whose log-odds are the outputs."""

    def sample(
        self, outputs: Float[Tensor, "b ..."], generator: torch.Generator
    ) -> Float[Tensor, "b ..."]:
        """Return ``p - y`` for drawn labels ``y``."""
        chances = outputs.sigmoid()
        return chances - (_uniform(chances, generator) < chances).to(chances.dtype)

    def roots(self, outputs: Float[Tensor, "b ..."]) -> list[Float[Tensor, "b ..."]]:
        """Return ``sqrt(p (1 - p))``, one label at a time."""
        chances = outputs.sigmoid()
        root = (chances * (1 - chances)).sqrt()
        if root.ndim == 1:
            return [root]
        columns = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
        return [root * column for column in columns]


class Tokens:
    """Tokens with the probabilities of a softmax, each with a weight in the loss.

    Outputs are logits and, in two last columns, the token's label and its weight.
    """

    def sample(
        self, outputs: Float[Tensor, "b t k"], generator: torch.Generator
    ) -> Float[Tensor, "b t k"]:
        r"""Return :math:`\sqrt{w_t} (p_t - e_{y_t})` for tokens drawn from the model.

        The two last columns get 0: no parameter moves them.
        """
        logits, weights = outputs[..., :-2], outputs[..., -1:]
        chances = logits.softmax(-1)
        uniform = _uniform(chances[..., :1], generator)
        hits = _hits(chances.flatten(0, 1), uniform.flatten(0, 1)).view_as(chances)
        found = (chances - hits) * weights.sqrt()
        return torch.nn.functional.pad(found, (0, 2))

    def roots(self, outputs: Float[Tensor, "b t k"]) -> list[Float[Tensor, "b t k"]]:
        r"""Return :math:`\sqrt{w_t p_{ty}} (p_t - e_y)`, a token and class at a time."""
        chances, weights = outputs[..., :-2].softmax(-1), outputs[..., -1:]
        units = torch.eye(chances.shape[2], dtype=chances.dtype, device=chances.device)
        found = []
        for t in range(chances.shape[1]):
            for y in range(chances.shape[2]):
                root = torch.zeros_like(outputs)
                scale = (weights[:, t] * chances[:, t, [y]]).sqrt()
                root[:, t, :-2] = scale * (chances[:, t] - units[y])
                found.append(root)
        return found


def _hits(chances: Float[Tensor, "b k"], uniform: Float[Tensor, "b 1"]) -> Tensor:
    """Draw a class of each row; 1 where it is."""
    drawn = (chances.double().cumsum(1) < uniform).sum(1, keepdim=True)
    drawn = drawn.clamp(max=chances.shape[1] - 1)  # the sum may fall short of 1
    return torch.zeros_like(chances).scatter_(1, drawn, 1.0)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device)
