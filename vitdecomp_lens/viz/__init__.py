"""Figures for papers and notebooks: each function returns a figure of matplotlib, or draws into an axis that is given.

Needs matplotlib, the optional extra ``viz``. No backend is chosen, no window opened, and no figure stays open:
``figure.savefig(path)`` writes it. Sizes are those of a column of a paper, colours of text and axes those of the style
that is on (``matplotlib.style``); what has two signs is red where it is positive and blue where it is negative, on a
scale with 0 in its middle that people see who are blind to red or green.
"""

from vitdecomp_lens.viz.curves import ablation_curves
from vitdecomp_lens.viz.grid import head_grid
from vitdecomp_lens.viz.matrix import component_feature_matrix
from vitdecomp_lens.viz.overlays import heatmap_overlays
from vitdecomp_lens.viz.tree import concept_tree

__all__ = ["ablation_curves", "component_feature_matrix", "concept_tree", "head_grid", "heatmap_overlays"]
