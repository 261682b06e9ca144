"""Which adapter hooks which model class.

Adapters are registered under the dotted name of the class they serve, so that a model library is imported
only when one of its models is wrapped. For one class, what was registered with `register_adapter` comes first, then
what is built in, then what installed distributions announce as entry points.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, TypeVar

from torch import nn

from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.hooked.blocks import HookedBlock

ENTRY_POINTS = "vitdecomp_lens.adapters"  # the group: names are model classes, values adapters, "package.module:Class"


@dataclass(frozen=True)
class ImageSpec:
    """What images a model takes.

    Attributes:
        channels: Number of channels.
        size: Height and width, or None where any size will do.
        multiple_of: What height and width must be multiples of, where any size will do.
    """

    channels: int
    size: tuple[int, int] | None
    multiple_of: tuple[int, int] = (1, 1)


@dataclass
class Tower:
    """A cloned image tower with its hook points in place: what an adapter makes.

    Attributes:
        module: The clone; calling it runs the model.
        parts: Modules that the hooked model shows under canonical names (``hook_embed``, ``ln_final``,
            ``attn_pool``, ...), in the order in which they run; ``blocks`` go where the key ``"blocks"`` stands.
        blocks: The hooked blocks, numbered flat.
        prefix: Names of the prefix tokens.
        image: What images the model takes.
        patch_grid: From height and width of an image to rows and columns of patches.
        patch_size: Height and width of a patch in pixels.
        weights_out: ``W_U`` and ``b_U`` of the map from representation to output, live; None where there is no such
            map.
        no_weights_out: Why not.
        curved: Whether an activation function stands between representation and output.
        frozen_weights_out: The same at one image's representation, where an activation function stands in between:
            from the representation [d_rep].
        constant_query: Whether the attention pool's query, if there is a pool, is a learned constant.
        pooled: Whether ``ln_final`` acts on pooled tokens.
        stages: Numbers of the blocks of each stage, where tokens are merged between stages.
        grid_of: From a hook name, and height and width of an image, to the tokens of the value there, where they
            are not the same everywhere.
    """

    module: nn.Module
    parts: dict[str, nn.Module]
    blocks: list[HookedBlock]
    prefix: tuple[str, ...]
    image: ImageSpec
    patch_grid: Callable[[int, int], tuple[int, int]]
    patch_size: tuple[int, int]
    weights_out: Callable[[], tuple[Any, Any]] | None = None
    no_weights_out: str = "This model has no classifier or projection: its representation is its output."
    curved: bool = False
    frozen_weights_out: Callable[[Any], tuple[Any, Any]] | None = None
    constant_query: bool = True
    pooled: bool = False
    stages: tuple[range, ...] = ()
    grid_of: Callable[[str, int, int], TokenGrid] | None = None

    def grid_at(self, hook: str, height: int, width: int) -> TokenGrid:
        """Return which pixels of an image each token stands for of the value at a hook."""
        if self.grid_of is not None:
            return self.grid_of(hook, height, width)
        rows, columns = self.patch_grid(height, width)
        return TokenGrid(rows, columns, (rows * self.patch_size[0], columns * self.patch_size[1]), self.prefix)


class Adapter(ABC):
    """Hooks one family of models.

    A subclass states how a cloned model gets its hook points, and how photographs become its input.
    """

    def tower_of(self, module: nn.Module) -> nn.Module:
        """Return the image tower of what the user gave: the module itself, unless overridden."""
        return module

    @abstractmethod
    def hook(self, clone: nn.Module) -> Tower:
        """Put hook points into a cloned tower."""

    @abstractmethod
    def transform(self, original: nn.Module, size: tuple[int, int] | None) -> Any:
        """Return the library's own evaluation transform for a model, from PIL image to tensor.

        Args:
            original: The model.
            size: Height and width that images must have; None where those of its configuration will do.
        """


AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])

_BUILT_IN = {
    "timm.models.vision_transformer:VisionTransformer": "vitdecomp_lens.hooked.timm_vit",
    "timm.models.deit:VisionTransformerDistilled": "vitdecomp_lens.hooked.timm_vit",
    "timm.models.swin_transformer:SwinTransformer": "vitdecomp_lens.hooked.timm_swin",
    "timm.models.swin_transformer_v2:SwinTransformerV2": "vitdecomp_lens.hooked.timm_swin_v2",
    "timm.models.swin_transformer_v2_cr:SwinTransformerV2Cr": "vitdecomp_lens.hooked.timm_swin_v2_cr",
    "timm.models.maxxvit:MaxxVit": "vitdecomp_lens.hooked.timm_maxxvit",
    "timm.models.cait:Cait": "vitdecomp_lens.hooked.timm_cait",
    "timm.models.xcit:Xcit": "vitdecomp_lens.hooked.timm_xcit",
    "timm.models.hiera:Hiera": "vitdecomp_lens.hooked.timm_hiera",
    "timm.models.vision_transformer_relpos:VisionTransformerRelPos": "vitdecomp_lens.hooked.timm_relpos",
    "timm.models.eva:Eva": "vitdecomp_lens.hooked.timm_eva",
    "timm.models.beit:Beit": "vitdecomp_lens.hooked.timm_beit",
    "open_clip.transformer:VisionTransformer": "vitdecomp_lens.hooked.open_clip_vit",
    "open_clip.model:CLIP": "vitdecomp_lens.hooked.open_clip_vit",
    "open_clip.model:CustomTextCLIP": "vitdecomp_lens.hooked.open_clip_vit",
    "open_clip.coca_model:CoCa": "vitdecomp_lens.hooked.open_clip_vit",
    "open_clip.timm_model:TimmModel": "vitdecomp_lens.hooked.open_clip_vit",
}
_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(*class_names: str) -> Callable[[AdapterClass], AdapterClass]:
    """Register an adapter for model classes given as ``"package.module:Class"``.

    An adapter that is defined again under its name, as by a cell of a notebook that is run again, replaces the one
    before.

    Raises:
        ValueError: If a class has another adapter already.

    Example:
        >>> @register_adapter("my_models:MyViT")
        ... class MyAdapter(Adapter):
        ...     def hook(self, clone): ...
        ...     def transform(self, original, size): ...
        >>> register_adapter("my_models:MyViT")(type("Another", (MyAdapter,), {}))
        Traceback (most recent call last):
            ...
        ValueError: 'my_models:MyViT' has an adapter already: MyAdapter. ...
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        for name in class_names:
            taken = _ADAPTERS.get(name)
            again = taken is not None and _place(taken) == _place(adapter)
            built_in = name in _BUILT_IN and adapter.__module__ != _BUILT_IN[name]
            if (taken is not None and not again) or built_in:
                owner = taken.__name__ if taken else _BUILT_IN[name]
                raise ValueError(
                    f"{name!r} has an adapter already: {owner}. Register a class of your own, for instance a "
                    f"subclass of the model."
                )
        _ADAPTERS.update(dict.fromkeys(class_names, adapter))
        return adapter

    return register


def _place(cls: type) -> str:
    """Where a class is defined, as adapters are registered: ``"package.module:Class"``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def has_adapter(module: nn.Module) -> bool:
    """Whether there is an adapter for a module's class, or for a parent whose ``forward`` it keeps.

    Raises:
        UnsupportedModelError: If an installed distribution announces one that cannot be loaded.
    """
    return _adapter_of(module, entry_points(group=ENTRY_POINTS)) is not None


def find_adapter(module: nn.Module) -> Adapter:
    """Return the adapter of a module's class, or of the nearest parent whose ``forward`` it keeps.

    Raises:
        UnsupportedModelError: If there is none; the message names one that is near. If an installed distribution
            announces one that cannot be loaded, it names the distribution.
    """
    _refuse_patched(module, "model")
    announced = entry_points(group=ENTRY_POINTS)
    if (adapter := _adapter_of(module, announced)) is not None:
        return adapter()
    known = sorted({*_BUILT_IN, *_ADAPTERS, *announced.names})
    shown = _place(type(module))
    # Names share much by being dotted: one less alike is of another kind of model.
    nearest = "".join(f"; the nearest is for {name}" for name in get_close_matches(shown, known, n=1, cutoff=0.8))
    raise UnsupportedModelError(
        f"There is no adapter for {shown}{nearest}. Register one with register_adapter, or "
        f"decompose the module as it is: decompose(module, images) works for any."
    )


def _adapter_of(module: nn.Module, announced: EntryPoints) -> type[Adapter] | None:
    for cls in type(module).__mro__:
        if _keeps_forward(module, cls) and (adapter := _adapter_for(_place(cls), announced)) is not None:
            return adapter
    return None


def _adapter_for(name: str, announced: EntryPoints) -> type[Adapter] | None:
    """The adapter of just this class: registered, built in, or announced."""
    entries = tuple(announced.select(name=name))
    if name in _BUILT_IN:
        _warn_of_unused(name, entries)
        if name not in _ADAPTERS:
            import_module(_BUILT_IN[name])
    if name in _ADAPTERS or not entries:
        return _ADAPTERS.get(name)
    if len(entries) > 1:
        raise UnsupportedModelError(
            f"{' and '.join(map(_distribution, entries))} announce an adapter of {name} each. Uninstall all but one, "
            f"or register the one that you want with register_adapter, which comes first."
        )
    return _load(entries[0])


def _load(entry: EntryPoint) -> type[Adapter]:
    try:
        adapter = entry.load()
    except Exception as error:  # whatever goes wrong in importing somebody else's code
        raise UnsupportedModelError(_broken(entry, f"it cannot be loaded: {type(error).__name__}: {error}")) from error
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise UnsupportedModelError(_broken(entry, f"expected a subclass of Adapter there; got {adapter!r}"))
    return adapter


def _broken(entry: EntryPoint, what: str) -> str:
    distribution = _distribution(entry)
    return (
        f"{distribution} announces {entry.value} as the adapter of {entry.name}, but {what}. Upgrade or uninstall "
        f"{distribution}, or register an adapter of your own with register_adapter, which comes first."
    )


def _warn_of_unused(name: str, entries: tuple[EntryPoint, ...]) -> None:
    for entry in entries:
        warnings.warn(
            f"{_distribution(entry)} announces {entry.value} as an adapter of {name}, which has a built-in one: that "
            f"is used. To have the other, register it for a subclass of the model.",
            VitDecompWarning,
            stacklevel=6,
        )


def _distribution(entry: EntryPoint) -> str:
    return "an unnamed distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def find_part(table: dict[type, Any], module: nn.Module, what: str) -> Any:
    """Look up how a submodule is hooked, by its class or the parent whose ``forward`` it keeps.

    Raises:
        UnsupportedModelError: If its class is not in the table, or its ``forward`` was replaced.
    """
    _refuse_patched(module, what)
    for cls in type(module).__mro__:
        if cls in table and _keeps_forward(module, cls):
            return table[cls]
    known = ", ".join(cls.__name__ for cls in table)
    raise UnsupportedModelError(
        f"The {what} {type(module).__module__}.{type(module).__qualname__} cannot be hooked; those that can are "
        f"{known}. vitdecomp_lens.trace works for any module."
    )


def _refuse_patched(module: nn.Module, what: str) -> None:
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"The {what} {type(module).__name__} has a forward that was put on this very module, as accelerate's hooks "
            f"and some patching tools do; wrapping would lose it. Take it off first (del module.forward, or the tool's "
            f"own way), or use vitdecomp_lens.trace, which works for any module."
        )


def _keeps_forward(module: nn.Module, cls: type) -> bool:
    """Whether a module runs the ``forward`` of one of its parent classes."""
    return type(module).forward is getattr(cls, "forward", None)


def check_methods(module: nn.Module, known: type[nn.Module], names: tuple[str, ...]) -> None:
    """Refuse a subclass that overrides a method which hooking relies on.

    Args:
        module: The module to be hooked.
        known: The library's class that the adapter is written for.
        names: The methods.

    Raises:
        UnsupportedModelError: Naming the method.
    """
    for name in names:
        if getattr(type(module), name) is not getattr(known, name):
            raise UnsupportedModelError(
                f"{type(module).__name__} overrides {name} of {known.__name__}, so its hooks would not be what "
                f"their names say. Register an adapter for it, or use vitdecomp_lens.trace, which works for any "
                f"module."
            )
