"""What is refused: models that cannot be hooked as they are, and images that a model cannot take."""

from typing import Any

import torch
from torch import Tensor, nn

from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked.registry import ImageSpec

_QUANTISED_MODULES = ("torch.ao.nn", "torch.nn.quantized", "torch.nn.quantizable", "bitsandbytes", "torchao", "quanto")


def check_module(module: Any) -> None:
    """Refuse a module that is wrapped, compiled, quantised or training with dropout.

    Raises:
        UnsupportedModelError: Saying what to do instead.
    """
    if not isinstance(module, nn.Module):
        by_name = f" For a model by name: HookedViT.from_timm({module!r})." if isinstance(module, str) else ""
        raise UnsupportedModelError(f"Expected a module; got {type(module).__name__}.{by_name}")
    name = type(module).__name__
    if name == "OptimizedModule" or any(child._compiled_call_impl is not None for child in module.modules()):
        raise UnsupportedModelError(
            "A compiled module cannot be hooked: its graph is fixed. Pass the module from before torch.compile "
            "(compiled._orig_mod)."
        )
    if isinstance(module, nn.DataParallel) or name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise UnsupportedModelError(
            f"{name} scatters its input over replicas that hooks would not see. Pass the module inside it: "
            f"HookedViT(model.module)."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError("A TorchScript module cannot be hooked. Pass the eager module it was made from.")
    _check_quantised(module)
    if module.training:
        check_training(module)


def _check_quantised(module: nn.Module) -> None:
    for path, child in module.named_modules():
        tensors = [*child._parameters.values(), *child._buffers.values()]
        kinds = [type(child), *(type(tensor) for tensor in tensors), *(type(getattr(t, "data", t)) for t in tensors)]
        by_class = any(kind.__module__.startswith(_QUANTISED_MODULES) for kind in kinds)
        weight = child._parameters.get("weight")
        by_dtype = weight is not None and not weight.dtype.is_floating_point
        if by_class or by_dtype:
            raise UnsupportedModelError(
                f"The submodule {path!r} ({type(child).__name__}) is quantised, so contributions would not be "
                f"linear in its output. Load the model in floating point."
            )


def check_training(module: nn.Module) -> None:
    """Refuse training mode while dropout, stochastic depth or patch dropout is active.

    Raises:
        UnsupportedModelError: Naming the first active module.
    """
    for path, child in module.named_modules():
        rate = next((getattr(child, key) for key in ("p", "drop_prob", "prob") if key in vars(child)), None)
        if isinstance(child, nn.MultiheadAttention):
            rate = child.dropout
        if ("drop" in type(child).__name__.lower() or isinstance(child, nn.MultiheadAttention)) and rate:
            raise UnsupportedModelError(
                f"The model is in training mode and {path!r} ({type(child).__name__}) drops values at random at "
                f"rate {rate}: two runs would differ. Call .eval() first, or set that rate to 0."
            )


def check_shape(images: Any, spec: ImageSpec) -> None:
    """Refuse images of a wrong kind, rank, channel number or size, without reading their values.

    Raises:
        InputError: Saying what was expected and what came.
    """
    wanted = (
        f"[batch, {spec.channels}, height, width]"
        if spec.size is None
        else (f"[batch, {spec.channels}, {spec.size[0]}, {spec.size[1]}]")
    )
    if not isinstance(images, Tensor):
        raise InputError(
            f"Images must be a tensor {wanted}; got {type(images).__name__}. Use model.preprocess(photographs)."
        )
    shape = list(images.shape)
    if not images.is_floating_point():
        raise InputError(
            f"Images must be floating point and normalised; got {images.dtype}. Use model.preprocess(photographs), "
            f"or scale and normalise them as the model was trained."
        )
    if images.ndim != 4:
        hint = "Add the batch axis: images[None]." if images.ndim == 3 else "Reshape them to one batch of images."
        raise InputError(f"Images must be {wanted}; got {shape}. {hint}")
    if images.shape[0] == 0:
        raise InputError(
            f"Images must be {wanted} with at least one image; got an empty batch {shape}. Check what selected them."
        )
    if images.shape[1] != spec.channels:
        hint = f"Use model.preprocess(photographs); grey images: images.expand(-1, {spec.channels}, -1, -1)."
        if images.shape[3] == spec.channels:
            hint = "Channels come first: images.permute(0, 3, 1, 2)."
        raise InputError(f"Images must have {spec.channels} channels, {wanted}; got {shape}. {hint}")
    height, width = images.shape[2:]
    if spec.size is not None and (height, width) != tuple(spec.size):
        raise InputError(
            f"Images must be {wanted}; got {shape}. Use model.preprocess(photographs), or resize them to "
            f"{spec.size[0]} × {spec.size[1]}."
        )
    if height % spec.multiple_of[0] or width % spec.multiple_of[1] or not height * width:
        raise InputError(
            f"Height and width must be multiples of {spec.multiple_of[0]} and {spec.multiple_of[1]}, so that patches "
            f"(and windows) tile the image; got {shape}. Crop or pad the images."
        )


def check_placement(images: Tensor, weights: Tensor) -> None:
    """Refuse images on another device, or of another dtype unless autocast is on.

    Raises:
        InputError: Saying which call moves them.
    """
    if images.device != weights.device:
        raise InputError(
            f"The model is on {weights.device} and the images are on {images.device}. Move them: "
            f"images.to({str(weights.device)!r})."
        )
    if images.dtype != weights.dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(
            f"The model is {weights.dtype} and the images are {images.dtype}. Convert them: images.to({weights.dtype})."
        )


def check_values(images: Tensor) -> None:
    """Refuse images with NaN or infinite values.

    Raises:
        InputError: Naming the first such image.
    """
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"Images must be finite; image {first} of {len(images)} has NaN or infinite values. Check how it was "
            f"loaded and normalised."
        )
