"""From a representation into a CLIP's space, component by component: z_CLIP ≈ Σ f_i(c_i) + b, with linear f_i.

The method is CompAlign's (arXiv 2406.01583, section 4): the sum has to point where CLIP's embedding points, and every
f_i to be an isometry, so that what is large and what varies much stays so (Theorem 1). A head writes into d_head of
the d_rep dimensions; its map is fitted, and an isometry, on that span, which fits into a CLIP's space even where
d_rep does not. In the coordinates of the spans, least squares and orthogonal maps have closed forms, from which Adam
has little left to do.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitdecomp_lens import storage
from vitdecomp_lens.clip.checkpoints import FitProgress
from vitdecomp_lens.clip.fitting import MAX_BYTES, FitOptions, fitted
from vitdecomp_lens.clip.moments import RANK_TOLERANCE, Layout
from vitdecomp_lens.clip.reports import TOLERANCE, AlignmentReport, Tally
from vitdecomp_lens.clip.sources import AlignmentSource, Paired, checked, images_of
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError
from vitdecomp_lens.selecting import Components, as_components, summary

__all__ = ["Aligner", "AlignmentReport", "AlignmentSource", "FitProgress"]

_OF_A_MODEL = ("model", "weights", "by", "of")
_FIT = "Fit an aligner on the same model and cut."
_REMEDY = {
    "weights": "It was probably made for another model: take the aligner of this one, or fit one to it. If it is the "
    "same model, load the weights that it was fitted with, in the same precision; weights_hash(model) of "
    "vitdecomp_lens.weights tells them apart."
}


@dataclass(frozen=True, eq=False, repr=False)
class Aligner:
    """A linear map for each component, from a representation into a CLIP's space, and one bias for their sum.

    It is kept as a basis for the span of each component and a map of that span; outside of its span a map is zero.

    Attributes:
        components: Which component each map is for.
        ranks: The dimension of each component's span; a single one where all components share one map.
        basis: Orthonormal bases of the spans as columns, in the order of `Layout`.
        weights: The maps of the spans, in the same order.
        bias: What is added once to the sum of mapped components.
        space: Which space the maps lead to, as the text bank that it is read with has it.
        metadata: Of which model and cut, and under ``"alignment"`` how the maps were fitted.
        fit_report: What was found on the images held out, which chose the start and when to stop: a little too good.
            For an unbiased figure, use `report` on images that had no part in the fit.

    Example:
        >>> from vitdecomp_lens.testbed.planted import planted_maps
        >>> planted = planted_maps(images=400, d_rep=24, d_clip=32, components=3, dtype=torch.float64)
        >>> aligner = Aligner.fit(planted.parts, planted.targets)
        >>> torch.allclose(aligner.maps, planted.maps, atol=1e-2), aligner.fit_report.cosine_distance < 1e-3
        (True, True)
        >>> planted.parts.map(aligner).values.shape  # the bias is a component
        torch.Size([4, 400, 32])
    """

    components: Components
    ranks: tuple[int, ...]
    basis: Float[Tensor, "d_rep coordinate"]
    weights: Float[Tensor, "coordinate d_clip"]
    bias: Float[Tensor, "d_clip"]
    space: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    fit_report: AlignmentReport | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", as_components(self.components, len(self.components)))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "metadata", storage.as_json("metadata", dict(self.metadata)))
        if len(self.ranks) not in (1, len(self.components)) or self.basis.shape[1] != sum(self.ranks):
            raise InputError(
                f"Expected a rank for each of {len(self.components)} components, {self.basis.shape[1]} in all; got "
                f"{len(self.ranks)} ranks, {sum(self.ranks)} in all."
            )
        if self.weights.shape != (self.basis.shape[1], len(self.bias)):
            raise InputError(
                f'Expected weights as Float[Tensor, "coordinate d_clip"] of shape '
                f"{(self.basis.shape[1], len(self.bias))}; got {tuple(self.weights.shape)}."
            )

    # ---- looking

    @cached_property
    def maps(self) -> Float[Tensor, "component d_rep d_clip"]:
        """The maps of the whole space, made when first asked for: ``c @ maps[i]`` is f_i(c)."""
        layout = Layout(self.ranks)
        maps = torch.stack([self.basis[:, columns] @ self.weights[columns] for columns in layout.slices])
        return maps.expand(len(self.components), -1, -1)

    @property
    def method(self) -> str | None:
        """How the maps were fitted."""
        return self.metadata.get("alignment", {}).get("method")

    def __repr__(self) -> str:
        return (
            f"Aligner(d_rep={len(self.basis)}, d_clip={len(self.bias)}, space={self.space!r}, {self.method}: "
            f"{summary(self.components)})"
        )

    # ---- fitting

    @classmethod
    def fit(
        cls,
        parts: Decomposition,
        targets: Float[Tensor, "batch d_clip"],
        *,
        method: str = "compalign",
        space: str | None = None,
        **options: Any,
    ) -> "Aligner":
        """Fit maps to the contributions to some images and CLIP's embeddings of them.

        Args:
            parts: Complete; the constants are components like others.
            targets: CLIP's embeddings. Their direction counts; where their lengths differ, they are tried too.
            method: As for `fit_stream`.
            space: The name of the targets' space.
            options: As for `fit_stream`.

        Raises:
            InputError: Also where the decomposition is incomplete.
            VitDecompError: As `fit_stream`.
        """
        return cls.fit_stream(Paired(parts, targets, space), method=method, **options)

    @classmethod
    def fit_stream(
        cls,
        source: AlignmentSource,
        *,
        method: str = "compalign",
        penalty: int | float = 1.0,
        held_out: int | float | Sequence[int] | Tensor = 0.1,
        epochs: int = 60,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        patience: int = 4,
        rank_tolerance: int | float = RANK_TOLERANCE,
        max_rank: int | None = None,
        max_bytes: int = MAX_BYTES,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Callable[[FitProgress], None] | None = None,
    ) -> "Aligner":
        """Fit maps to contributions and targets that are read piece by piece.

        The source is read once for the spans, once for coordinates in them (which are kept where they fit into
        ``max_bytes``, and read again for every pass where they do not), and once for the report. The same source, seed
        and machine give the same maps, bit for bit; how the source is cut into chunks changes no more than rounding.

        Images that are kept are seen in a new random order in every epoch. Images that are read again are shuffled only
        among those that fit into ``max_bytes`` together: a source sorted by class should then be shuffled once.

        Args:
            source: Where from.
            method: ``"compalign"``: isometries on the components' spans by a penalty, as Theorem 1 asks for;
                ``"compalign_paper"``: with the penalty of the paper's code, on all d_rep dimensions;
                ``"unconstrained"``: without; ``"orthogonal"``: exact isometries; ``"shared"``: one unconstrained map
                for all components. Where a span has more than d_clip dimensions, no isometry exists, and isometry is
                asked of the transpose (a co-isometry); the report names these components.
            penalty: The weight of the penalty: of the mean over components of ‖WWᵀ − I‖² / r. (1 is the paper's.)
            held_out: Which images choose start and end of the fit, and make its report: a fraction, drawn by the seed
                (at most 5,000 images), their numbers, or a mask.
            epochs: How often all images are seen at most; 0 keeps the closed form.
            batch_size: How many images a step takes.
            learning_rate: Adam's, to begin with, at most 1; lowered whenever images held out do not gain.
            patience: After how many epochs in a row without a gain to end.
            rank_tolerance: A direction belongs to a component's span where the standard deviation along it is more
                than this share of the largest.
            max_rank: How many dimensions a span has at most: those of most variance.
            max_bytes: The largest table to keep, of each of two: images in coordinates, and their moments with what it
                takes to solve for maps. Beyond it, images are read again, and components fitted in blocks.
            seed: Which images are held out, which show the spans, and the order of the others.
            checkpoint: A file to write after each epoch and, where it exists, to go on from.
            progress: Called with the start and after each epoch.

        Raises:
            InputError: Where images, targets or options cannot be used.
            StoreError: Where the checkpoint is damaged, or of another fit.
        """
        options = FitOptions(
            method=method,
            penalty=penalty,
            seed=seed,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            patience=patience,
            rank_tolerance=rank_tolerance,
            max_rank=max_rank,
            max_bytes=max_bytes,
        )
        found = fitted(source, options, held_out=held_out, checkpoint=checkpoint, progress=progress)
        aligner = cls(
            tuple(source.components),
            found.maps.ranks,
            found.maps.basis,
            found.maps.weights,
            found.bias,
            source.space,
            {**source.metadata, "alignment": found.how},
        )
        return aligner._with_report(source, found.held_out)

    def _with_report(self, source: AlignmentSource, held_out: Tensor) -> "Aligner":
        tally = self._tally()
        for first, values, targets, _ in checked(source):
            here = held_out[first : first + len(targets)]
            if bool(here.any()):
                tally.add(images_of(values, here), targets[here.to(targets.device)])
        object.__setattr__(self, "fit_report", tally.report([c.label for c in self.components]))
        return self

    def _tally(self) -> Tally:
        return Tally(self.basis, Layout(self.ranks), self.weights, self.bias)

    # ---- judging

    def report(
        self,
        parts: Decomposition,
        targets: Float[Tensor, "batch d_clip"],
        *,
        tolerance: int | float = TOLERANCE,
        seed: int = 0,
    ) -> AlignmentReport:
        """Measure these maps on images that they were not fitted to.

        Args:
            parts: Of the model and cut that the maps are for.
            targets: CLIP's embeddings of the same images.
            tolerance: From which relative difference on norms have an order.
            seed: Which pairs are drawn for the order of norms.

        Raises:
            InputError: Where the decomposition is another model's or cut's, or targets do not fit.
        """
        self.refuse_other(parts)
        source = Paired(parts, targets)
        if targets.shape[1] != len(self.bias):
            raise InputError(f"Expected targets of width d_clip={len(self.bias)}; got {targets.shape[1]}.")
        order = [parts.labels.index(component.label) for component in self.components]
        tally = self._tally()
        for piece in checked(source):
            tally.add(piece.values[order], piece.targets)
        return tally.report([c.label for c in self.components], tolerance=tolerance, seed=seed)

    def refuse_other(self, parts: Decomposition | None = None, *, space: str | None = None) -> None:
        """Raise where these maps were made for another model, another cut or another space.

        Args:
            parts: What is to be mapped. Where it was made from tensors of one's own, and does not say of which model
                it is, its components have to be enough.
            space: Where it is to be mapped to.

        Raises:
            InputError: Then.
        """
        if space is not None and self.space is not None and space != self.space:
            raise InputError(
                f"Expected an aligner into the space {space!r}; this one leads to {self.space!r}. Fit one to "
                f"embeddings of that space, or use texts of this one."
            )
        if parts is None:
            return
        for name in _OF_A_MODEL:
            mine, other = self.metadata.get(name), parts.metadata.get(name)
            if mine is None or mine == other:
                continue
            if other is not None:
                raise InputError(
                    f"Expected a decomposition that this aligner was made for, with {name}={mine!r}; got one with "
                    f"{name}={other!r}. {_REMEDY.get(name, _FIT)}"
                )
            if name == "weights" and parts.metadata.get("model") is not None:  # batches of several models, say
                raise InputError(
                    f"Expected a decomposition that this aligner was made for, with weights={mine!r}; got one of a "
                    f"{parts.metadata['model']} that does not say of which weights. Decompose with these, and put "
                    f"together only what one model wrote."
                )
        labels = {component.label for component in self.components}
        if labels != set(parts.labels) or parts.values.shape[-1] != len(self.basis):
            strange = sorted(labels ^ set(parts.labels))
            what = f"{strange[0]!r} is in only one of them" if strange else f"it has d_rep={parts.values.shape[-1]}"
            raise InputError(
                f"Expected a decomposition into the {len(labels)} components of d_rep={len(self.basis)} that this "
                f"aligner was made for; {what}. {_FIT}"
            )

    # ---- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all.

        Raises:
            StoreError: Where the file cannot be written.
        """
        tensors = {"basis": self.basis, "weights": self.weights, "bias": self.bias}
        header: dict[str, Any] = {"components": storage.pack_components(self.components), "ranks": self.ranks}
        header |= {"space": self.space, "metadata": self.metadata, "report": None}
        if self.fit_report is not None:
            header["report"], found = self.fit_report.packed()
            tensors |= {f"report.{name}": tensor for name, tensor in found.items()}
        storage.write(path, kind="Aligner", tensors=tensors, header=header)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, for_: Decomposition | None = None, space: str | None = None
    ) -> "Aligner":
        """Read what `save` wrote, onto the CPU. Nothing is unpickled.

        Args:
            path: The file.
            for_: What is going to be mapped; an aligner of another model or cut is refused.
            space: Where to; an aligner into another space is refused.

        Raises:
            StoreError: Where the file is missing, damaged, half-written, or holds something else.
            InputError: Where the aligner is another model's, cut's or space's.
        """
        tensors, header = storage.read(path, kind="Aligner", needs=("basis", "weights", "bias"))
        with storage.restoring(path, kind="Aligner"):
            report = header["report"]
            if report is not None:
                found = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("report.")}
                report = AlignmentReport.unpacked(report, found)
            aligner = cls(
                storage.unpack_components(header["components"]),
                tuple(header["ranks"]),
                tensors["basis"],
                tensors["weights"],
                tensors["bias"],
                header["space"],
                header["metadata"],
                report,
            )
        aligner.refuse_other(for_, space=space)
        return aligner
