"""A small world in which it is known what is where."""

from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scene, Scenes

__all__ = ["ATTRIBUTES", "Scene", "Scenes"]
