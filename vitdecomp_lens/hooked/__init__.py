"""Hooked models: TransformerLens hook points around unmodified vision transformers."""

from vitdecomp_lens.hooked.model import HookedViT
from vitdecomp_lens.hooked.registry import Adapter, ImageSpec, Tower, register_adapter

__all__ = ["Adapter", "HookedViT", "ImageSpec", "Tower", "register_adapter"]
