"""Heatmaps of texts and classes: where in an image the components that write them read; zero-shot segmentation.

`of_texts` and `of_classes` make maps from a model, `from_tokens` from scores by token that there are already, and
`raw_attention`, `rollout`, `chefer`, `grad_cam`, `attention_cam` and `constant` what they are compared with: all of
them are `Heatmaps`. `segment` holds maps against masks, `hits` and `prefers` against objects; `save_overlays` draws
them.
"""

from vitdecomp_lens.applications.heatmap.attention import attention_cam, chefer, raw_attention, rollout
from vitdecomp_lens.applications.heatmap.carried import Carried
from vitdecomp_lens.applications.heatmap.gradients import constant, grad_cam
from vitdecomp_lens.applications.heatmap.making import from_tokens, of_classes, of_texts, tokens_of_classes
from vitdecomp_lens.applications.heatmap.maps import ANY, OWN, Heatmaps
from vitdecomp_lens.applications.heatmap.overlays import save_overlays
from vitdecomp_lens.applications.heatmap.segmenting import (
    Segmentation,
    as_seen,
    average_precision,
    choose_threshold,
    foreground,
    hits,
    prefers,
    segment,
)

__all__ = [
    "ANY",
    "OWN",
    "Carried",
    "Heatmaps",
    "Segmentation",
    "as_seen",
    "attention_cam",
    "average_precision",
    "chefer",
    "choose_threshold",
    "constant",
    "foreground",
    "from_tokens",
    "grad_cam",
    "hits",
    "of_classes",
    "of_texts",
    "prefers",
    "raw_attention",
    "rollout",
    "save_overlays",
    "segment",
    "tokens_of_classes",
]
