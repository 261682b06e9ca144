"""Contributions over a data set, into a `Store`: one pass through a model and a CLIP, batch by batch.

A chunk of the store is one batch of fixed size, in the order of the data set, whoever computes it. So a run that is
killed goes on where it was, and several processes make the same store as one.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vitdecomp_lens import storage
from vitdecomp_lens.collecting.files import MANIFEST, RESUME, StoreFiles, read_json, write_json
from vitdecomp_lens.collecting.gathered import Gather, Gathered, Part
from vitdecomp_lens.collecting.images import ImageSource, images_from
from vitdecomp_lens.collecting.models import Eye, preprocess_of
from vitdecomp_lens.collecting.pictures import Preprocess, Preprocessor
from vitdecomp_lens.collecting.processes import Processes
from vitdecomp_lens.collecting.reading import Reader
from vitdecomp_lens.collecting.running import Progress, Run
from vitdecomp_lens.components import By
from vitdecomp_lens.decompose import decompose
from vitdecomp_lens.decomposition import Decomposition
from vitdecomp_lens.errors import InputError, StoreError
from vitdecomp_lens.store import Store
from vitdecomp_lens.weights import weights_hash

__all__ = ["Gather", "ImageSource", "Store", "collect", "images_from"]

KEEP = ("contributions", "representations", "embeddings")
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PACKAGES = ("vitdecomp-lens", "torch", "timm", "open_clip_torch", "pillow")


def collect(
    model: nn.Module,
    source: Any,
    out: str | os.PathLike[str],
    *,
    clip: nn.Module | None = None,
    space: str | None = None,
    by: By = "head",
    of: str = "representation",
    components: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    gather: Gather | None = None,
    unreadable: Literal["stop", "skip"] = "stop",
    resume: bool = False,
    preprocess: Preprocess | None = None,
    readers: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Decompose every image of a data set, and keep what is asked for on disk.

    Started with ``accelerate launch`` or ``torchrun``, all processes fill one folder, which they have to share: process
    r of n takes the chunks r, r + n, and so on.

    Args:
        model: As for `decompose`.
        source: The images: whatever `images_from` takes.
        out: The folder of the store.
        clip: A whole CLIP, or its hooked tower together with ``space``. Where it is the model itself, its
            representation is the embedding, and nothing runs twice.
        space: A name for the CLIP's space; None for `space_of`, a hash of the weights.
        by: As for `decompose`.
        of: As for `decompose`, by name.
        components: As for `decompose`: some of them; all by default.
        keep: What to store of every image: ``"contributions"``, ``"representations"``, ``"embeddings"``, or nothing;
            by default all that there is. Identifiers and labels always are.
        dtype: The precision of stored contributions. All else is stored as it was computed.
        batch_size: How many images are a batch, and a chunk.
        gather: Statistics to gather in the same pass, of contributions before they are rounded.
        unreadable: Whether an image that cannot be read stops everything, or is skipped and listed.
        resume: Go on with the store that is there. It has to be of the same request; only ``unreadable`` may be
            another, and counts for what is read from here on.
        preprocess: From a list of PIL images to a batch, for a model that has no ``preprocess`` of its own.
        readers: How many images are opened at once; by default one for each processor, eight at most.
        progress: Called after every chunk of this process with the number of images done, of all of its images (None if
            not known), and of those that were there before.

    Returns:
        The store, finished.

    Raises:
        InputError: Where images or options cannot be used; the message names the image.
        StoreError: Where the folder holds something else, or is full. What is stored stays, and resuming goes on.
        VitDecompError: As `decompose`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from vitdecomp_lens import HookedViT
        >>> photographs = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
        >>> model = HookedViT.from_timm("test_vit", num_classes=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = collect(model, [(photograph, 0) for photograph in photographs], folder, batch_size=2)
        ...     store.count, store.decomposition([0, 2]).values.shape[1:]
        (3, torch.Size([2, 64]))
    """
    _refuse_options(keep, dtype, batch_size, unreadable, readers)
    images = images_from(source)
    eye = None if clip is None else Eye.of(clip, model, of=of, space=space)
    preprocessors = [Preprocessor(preprocess_of(model, preprocess))]
    cut = _probe(model, preprocessors[0], by=by, of=of, components=components)
    if eye is not None and not eye.is_model:
        preprocessors.append(eye.preprocessor())
    asked = {
        **_identities(model, eye, preprocessors, images),
        "by": by,
        "of": of,
        "keep": _kept(keep, eye, gather),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "gather": None if gather is None else gather.as_json(),
    }
    processes = Processes(cut.values.device)  # before the manifest, because it may change the number of threads
    files = StoreFiles(Path(out), _manifest(asked, cut, images))
    statistics = None if gather is None else _statistics(gather, cut, eye, preprocessors[-1])
    _begin(files, processes, resume)
    reader = Reader(images, batch_size, tuple(preprocessors), unreadable == "skip", readers or _readers())
    part = None if statistics is None else Part(files.folder, processes.rank, files.key, statistics)
    Run(model, eye, cut, files, reader, part, processes, progress).all_chunks()
    processes.wait()
    if processes.rank == 0:
        files.finish(len(files.numbers()) if images.count is None else -(-images.count // batch_size))
    processes.wait()
    return Store(files.folder)


def _refuse_options(
    keep: Sequence[str] | None, dtype: torch.dtype, batch_size: int, unreadable: str, readers: int | None
) -> None:
    for name in (keep,) if isinstance(keep, str) else keep or ():
        if name not in KEEP or isinstance(keep, str):
            raise InputError(f"Expected keep= as a list of {', '.join(map(repr, KEEP))}; got {keep!r}.")
    if dtype not in DTYPES:
        raise InputError(f"Expected dtype= as one of {', '.join(sorted(map(str, DTYPES)))}; got {dtype}.")
    for option, number in (("batch_size", batch_size), ("readers", 1 if readers is None else readers)):
        if number < 1:
            raise InputError(f"Expected {option}= of at least 1; got {number}.")
    if unreadable not in ("stop", "skip"):
        raise InputError(f"Expected unreadable='stop' or 'skip'; got {unreadable!r}.")


def _readers() -> int:
    return min(8, os.cpu_count() or 1)


def _probe(model: nn.Module, preprocessor: Preprocessor, **options: Any) -> Decomposition:
    """One picture decomposed, which tells what the components are before any image is read."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (3, *preprocessor.size), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return decompose(model, preprocessor.batch([preprocessor.one(noise)]), **options)


def _statistics(gather: Gather, cut: Decomposition, eye: Eye | None, preprocessor: Preprocessor) -> Gathered:
    """Statistics of nothing yet, as wide as they are going to be."""
    components, _, d_rep = cut.values.shape
    d_clip = 0
    if gather.cross and eye is not None:
        black = torch.zeros(3, *preprocessor.size, dtype=torch.uint8)
        d_clip = d_rep if eye.is_model else eye(preprocessor.batch([preprocessor.one(black)])).shape[-1]
    return Gathered(components, d_rep, gather, d_clip, cut.values.device)


# --- what is asked for ----------------------------------------------------------------------------------------------


def _identities(
    model: nn.Module, eye: Eye | None, preprocessors: Sequence[Preprocessor], images: ImageSource
) -> dict[str, Any]:
    """What tells models and images from others."""
    return {
        "model": weights_hash(model),
        "clip": None if eye is None else weights_hash(eye.tower),
        "space": None if eye is None else eye.space,
        "preprocess": [preprocessor.fingerprint for preprocessor in preprocessors],
        "images": images.identity,
        "count": images.count,
    }


def _kept(keep: Sequence[str] | None, eye: Eye | None, gather: Gather | None) -> list[str]:
    there = KEEP if eye is not None else KEEP[:2]
    kept = [name for name in KEEP if name in (there if keep is None else keep)]
    if eye is None and ("embeddings" in kept or (gather is not None and gather.cross)):
        raise InputError("Embeddings are a CLIP's: expected clip=, as open_clip.create_model(...) makes it; got none.")
    return kept


def _manifest(asked: Mapping[str, Any], cut: Decomposition, images: ImageSource) -> dict[str, Any]:
    packed = storage.pack(complete=cut.complete, coverage=cut.coverage, metadata=cut.metadata)
    manifest = {
        "asked": dict(asked),
        "cut": {**packed, "components": storage.pack_components(cut.components)},
        "labels": {name: None if names is None else list(map(str, names)) for name, names in images.labels.items()},
        "made_with": _made_with(cut.values.device),
    }
    found: dict[str, Any] = storage.as_json("a manifest", manifest)
    return found


def _made_with(device: torch.device) -> dict[str, Any]:
    """What else the last bits of a value depend on."""
    versions = {package: version(package) for package in PACKAGES}
    return {"threads": torch.get_num_threads(), "device": device.type, "python": platform.python_version(), **versions}


# --- beginning ------------------------------------------------------------------------------------------------------


def _begin(files: StoreFiles, processes: Processes, resume: bool) -> None:
    """Make the folder and its manifest, or see that those which are there will do; all processes."""
    if processes.rank == 0:
        _make(files, resume)
    processes.wait()
    differ = list(_differences(read_json(files.folder / MANIFEST), files.manifest))
    if differ:
        raise StoreError(
            f"The store at {str(files.folder)!r} is of another request: {'; '.join(differ[:5])}. Ask for the same "
            f"(threads: torch.set_num_threads, or OMP_NUM_THREADS), or choose another place."
        )
    if processes.rank == 0:  # not before it is known to be this very store
        files.tidy()
    processes.wait()  # or what others begin to write would be tidied


def _make(files: StoreFiles, resume: bool) -> None:
    folder, manifest = files.folder, files.folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.is_file():
            files.tidy_manifest()
        others = next(iter(folder.iterdir()), None)
    except OSError as error:
        raise StoreError(
            f"Expected a folder for the store at {str(folder)!r}: {error}. Choose another place."
        ) from error
    if manifest.is_file() and not resume:
        raise StoreError(f"There is a store at {str(folder)!r}. Go on with it with {RESUME}, or choose another place.")
    if manifest.is_file():
        return
    if others is not None:
        raise StoreError(f"Expected an empty folder for a new store; {str(folder)!r} holds {others.name!r}.")
    with files.resumable():
        write_json(manifest, files.manifest)


def _differences(stored: Any, asked: Any, where: str = "") -> Iterator[str]:
    """Where two manifests differ."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for name in {**stored, **asked}:
            yield from _differences(stored.get(name), asked.get(name), f"{where}.{name}" if where else name)
    elif stored != asked:
        shown = (f"{value!r:.100}" for value in (stored, asked))
        yield "{} is {} there, and {} is asked for".format(where, *shown)
