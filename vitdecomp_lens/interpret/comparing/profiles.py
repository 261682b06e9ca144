"""Which components of two models say the same of the same texts."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.interpret.comparing.inputs import (
    NOISE,
    noise_of,
    refuse_parts,
    total_of,
    unvarying,
    without_constants,
)
from vitdecomp_lens.interpret.comparing.matches import Matching, draws_for, matched, refuse_draws

Profile = Literal["correlation", "variance"]
PROFILES: tuple[str, ...] = get_args(Profile)


@torch.no_grad()
def match_by_texts(
    first: Decomposition,
    second: Decomposition,
    bank: TextBank,
    *,
    profile: str = "correlation",
    centre: bool = True,
    rotations: int | None = None,
    seed: int = 0,
) -> Matching:
    """Match components of two models by what they say of the texts of one bank: the cosine of their `text_profiles`.

    The models may have seen different images. Chance turns what the second model writes by a random rotation of the
    space of texts: it writes as much and as variably as before, in directions that the first has nothing to do with.
    It does not permute texts. Texts are not independent of each other, and any two profiles that vary smoothly over
    related texts agree more than permutations would have it.

    Args:
        first: Contributions in the space of the texts. Select the heads first to match heads.
        second: Those of another model.
        bank: The texts.
        profile: As for `text_profiles`.
        centre: As for `text_profiles`.
        rotations: How often to draw chance. None for 20 times the components of the model that has more, so that a
            single match can be found among them; fewer where these would take more than 2**42 operations, but never
            fewer than 200. A drawing takes 4 · texts · d_clip · (ranks of the second's components) operations: for 36
            heads of rank 64 by 3,500 texts of 512 dimensions 1 s on a CPU core, and there are 266 of them, so that
            three have to stand out together; for 144 heads 3 s, and there are 200.
        seed: Of the drawing.

    Raises:
        InputError: As `text_profiles`.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_spans
        >>> planted = planted_spans(images=60, d_clip=16, texts=40)
        >>> bank = TextBank(planted.texts, planted.directions, space="planted")
        >>> turned = planted.parts.select(labels=planted.parts.labels[::-1])
        >>> found = match_by_texts(planted.parts, turned, bank, profile="variance", rotations=20)
        >>> all(match.component == match.other and match.mutual for match in found.matches)
        True
    """
    first, second = without_constants(first), without_constants(second)
    refuse_draws(rotations, "rotations")
    mine, others = (_Spans.of(parts, bank, profile) for parts in (first, second))
    texts = bank.directions.to(first.values.device, torch.float64)
    if rotations is None:
        each = (2 if others.total is None else 4) * sum(axes.numel() for axes in others.own) * len(bank)
        rotations = draws_for(max(len(first), len(second)), each)
    said = _unit(mine.profiles(texts, centre))
    generator = torch.Generator().manual_seed(seed)

    def compare(draw: int | None) -> Float[Tensor, "first second"]:
        # What a turned component says of texts is what the component says of texts that are turned back.
        turned = texts if draw is None else texts @ _rotation(texts.shape[1], generator).to(texts)
        profiles = others.profiles(turned.to(second.values.device), centre)
        return said @ _unit(profiles).to(said).T

    return matched(first, second, f"{profile} with {len(bank)} texts", compare, rotations)


@torch.no_grad()
def text_profiles(
    parts: Decomposition, bank: TextBank, *, profile: str = "correlation", centre: bool = True
) -> Float[Tensor, "component text"]:
    """What each component says of each text of a bank.

    Args:
        parts: Contributions in the space of the texts.
        bank: The texts.
        profile: ``"correlation"`` over images of what the component writes along a text with what the whole model
            writes there, for which the total is needed; or the ``"variance"`` of what the component writes there.
        centre: Whether to take off each component's mean over texts. Then the cosine of two profiles is a correlation
            over texts; without, what a component says of all texts alike counts too.

    Returns:
        In double precision; 0 for a component that does not vary, and of correlations along a text where component or
        model write nothing but rounding.

    Raises:
        InputError: Where contributions and texts are of different spaces, contributions have no total, NaN or Inf,
            there are fewer than two images, or no such profile.
    """
    texts = bank.directions.to(parts.values.device, torch.float64)
    return _Spans.of(parts, bank, profile).profiles(texts, centre)


@dataclass(frozen=True)
class _Spans:
    """Second moments of components, in the few directions along which each of them varies.

    Attributes:
        own: For each component F, where FᵀF is its covariance.
        others: For each component G, where FᵀG is its covariance with the total; empty for profiles of variance.
        total: The total's covariance; None for profiles of variance.
        least: The variance of each component along a direction that is rounding.
        least_of_total: The same of the total.
    """

    own: list[Float[Tensor, "_ d_clip"]]
    others: list[Float[Tensor, "_ d_clip"]]
    total: Float[Tensor, "d_clip d_clip"] | None
    least: list[float]
    least_of_total: float

    @classmethod
    def of(cls, parts: Decomposition, bank: TextBank, profile: str) -> "_Spans":
        if profile not in PROFILES:
            raise InputError(f"Expected profile= as one of {', '.join(map(repr, PROFILES))}; got {profile!r}.")
        refuse_parts(parts, bank)
        images, total, least_of_total = parts.values.shape[1], None, 0.0
        noise = noise_of(parts.values.dtype) / math.sqrt(images)
        if profile == "correlation":
            total = total_of(parts).double()
            least_of_total = (noise * float(total.norm())) ** 2
            total = (total - total.mean(0)) / math.sqrt(images)
        own, others, least = [], [], []
        still = unvarying(parts.values).tolist()
        for values, empty in zip(parts.values, still, strict=True):  # one by one: in double precision, all are large
            wide = values.double()
            least.append((noise * float(wide.norm())) ** 2)
            axes, codes = _factors(wide / math.sqrt(images))
            own.append(axes[:0] if empty else axes)
            if total is not None:
                others.append((codes.T @ total)[:0] if empty else codes.T @ total)
        return cls(own, others, None if total is None else total.T @ total, least, least_of_total)

    def profiles(self, texts: Float[Tensor, "text d_clip"], centre: bool) -> Float[Tensor, "component text"]:
        found = torch.stack([self._said(row, texts) for row in range(len(self.own))])
        if self.total is not None:
            whole = einsum(texts @ self.total, texts, "text d_clip, text d_clip -> text")
            found = torch.where(whole > self.least_of_total, found / whole.clamp(min=0).sqrt(), 0)
        return found - found.mean(1, keepdim=True) if centre else found

    def _said(self, row: int, texts: Float[Tensor, "text d_clip"]) -> Float[Tensor, "text"]:
        """The variance along each text, or the covariance with the total divided by the standard deviation."""
        along = texts @ self.own[row].T
        variance = along.square().sum(1)
        if self.total is None:
            return variance
        covariance = (along * (texts @ self.others[row].T)).sum(1)
        return torch.where(variance > self.least[row], covariance / variance.sqrt(), 0)


def _factors(
    values: Float[Tensor, "batch d_clip"],
) -> tuple[Float[Tensor, "rank d_clip"], Float[Tensor, "batch rank"]]:
    """Around their mean, values are the product of the second (orthonormal columns) with the first."""
    centred = values - values.mean(0)
    squares, axes = torch.linalg.eigh(centred.T @ centred)
    held = squares > NOISE**2 * squares[-1]
    lengths, axes = squares[held].sqrt(), axes[:, held]
    return (axes * lengths).T, centred @ (axes / lengths)


def _rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """An orthogonal matrix, any as likely as any other."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _unit(profiles: Float[Tensor, "component text"]) -> Float[Tensor, "component text"]:
    return torch.nn.functional.normalize(profiles, dim=1)
