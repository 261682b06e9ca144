"""What contributions are good for, one module an application; none of them needs another.

- `ablation`: curves of what is left of a model, one component after the other taken away.
- `retrieval`: images by a text, or by a reference image in one property.
- `heatmap`: where components read what they write for a text or class; segmentation, and what it is compared with.
- `repair`: components that carry what a model should not go by, found, taken away, and folded out of its weights.

Import the one that is wanted::

    from vitdecomp_lens.applications import repair

    ranking = repair.rank(scores, "background", "shape")
"""
