"""A small world in which it is known what is where, and six trained models that see it."""

from vitdecomp_lens.testbed.aligners import aligner
from vitdecomp_lens.testbed.models import CLASSES, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scene, Scenes
from vitdecomp_lens.testbed.shipped import load, load_original
from vitdecomp_lens.testbed.vocabulary import tokenize

__all__ = ["ATTRIBUTES", "CLASSES", "Scene", "Scenes", "aligner", "load", "load_original", "normalised", "tokenize"]
