"""Figures that the paper published, of large models on photographs (arXiv 2406.01583, Tables 3 and 5).

They stand beside what is measured; no error bars were given. What they call mAP is `two_class_average_precision`.
"""

from collections.abc import Mapping

from vitdecomp_lens.evaluation.records import Record, Results

__all__ = ["published"]

SEGMENTED: Mapping[str, Mapping[str, tuple[float, float, float]]] = {  # pixel accuracy, mIoU, mAP
    "decomposition": {
        "DeiT": (0.7719, 0.5291, 0.8305),
        "DINO": (0.7577, 0.4863, 0.8111),
        "Swin": (0.7136, 0.4338, 0.7620),
        "MaxViT": (0.7163, 0.4237, 0.7237),
    },
    "Chefer": {"DeiT": (0.7307, 0.4785, 0.7870), "DINO": (0.7309, 0.4541, 0.8080)},
    "GradCAM": {
        "DeiT": (0.6533, 0.4625, 0.7129),
        "DINO": (0.7045, 0.4309, 0.7481),
        "Swin": (0.5973, 0.2360, 0.5365),
        "MaxViT": (0.4732, 0.1705, 0.4243),
    },
}
REPAIRED: Mapping[str, Mapping[str, tuple[float, float]]] = {  # worst group, average of groups, on Waterbirds
    "before": {
        "CLIP": (0.507, 0.727),
        "DeiT": (0.733, 0.874),
        "DINO": (0.800, 0.900),
        "DINOv2": (0.967, 0.983),
        "Swin": (0.834, 0.927),
        "MaxViT": (0.777, 0.875),
    },
    "direct, the paper's 10": {
        "CLIP": (0.744, 0.790),
        "DeiT": (0.815, 0.913),
        "DINO": (0.911, 0.938),
        "DINOv2": (0.978, 0.986),
        "Swin": (0.871, 0.944),
        "MaxViT": (0.814, 0.887),
    },
}


def published() -> Results:
    """All of them, as records.

    Example:
        >>> published().mean(measure="mIoU", model="DeiT", method="decomposition")
        0.5291
    """
    segmented = (
        Record("segmentation", measure, model, method, 0, value)
        for method, models in SEGMENTED.items()
        for model, values in models.items()
        for measure, value in zip(("pixel accuracy", "mIoU", "mAP"), values, strict=True)
    )
    repaired = (
        Record("spurious correlation", measure, model, method, 0, value)
        for method, models in REPAIRED.items()
        for model, values in models.items()
        for measure, value in zip(("worst group", "average of groups"), values, strict=True)
    )
    return Results((*segmented, *repaired), {"source": "arXiv 2406.01583, Tables 3 and 5"})
