"""Which of ImageNet's classes are kinds of what COCO calls an object, by meaning; COCO's outlines as masks.

COCO has names for objects where ImageNet has names for kinds: a dog of COCO's may be any of 118. Where ImageNet has no
kind of a thing (person, giraffe, skateboard), the thing is left out; where the same word means another thing (kite, the
bird), too.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor

from vitdecomp_lens.errors import InputError

__all__ = ["IMAGENET_KINDS", "NAMES", "outlines"]

# In the order of their numbers in outlines of YOLO's form.
NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
)

# Numbers of ImageNet-1k's classes, which `vitdecomp_lens.class_names` names.
_KINDS: Mapping[str, tuple[int, ...]] = {
    "bicycle": (444, 671),
    "car": (436, 468, 511, 609, 627, 656, 661, 751, 817),
    "motorcycle": (665, 670),
    "airplane": (404, 895),
    "bus": (654, 779, 874),
    "train": (466, 547, 565, 705, 820),
    "truck": (555, 569, 675, 717, 864, 867),
    "boat": (472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914),
    "traffic light": (920,),
    "stop sign": (919,),
    "parking meter": (704,),
    "bench": (703,),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": tuple(range(281, 286)),
    "dog": tuple(range(151, 269)),
    "horse": (339,),
    "sheep": (348, 349),
    "cow": (345,),
    "elephant": (101, 385, 386),
    "bear": tuple(range(294, 298)),
    "zebra": (340,),
    "backpack": (414,),
    "umbrella": (879,),
    "handbag": (748,),
    "tie": (457, 906),
    "skis": (795,),
    "sports ball": (430, 574, 722, 768, 805, 852, 890),
    "tennis racket": (752,),
    "bottle": (440, 737, 898, 907),
    "wine glass": (572,),
    "cup": (504, 968),
    "knife": (499,),
    "spoon": (910,),
    "bowl": (659, 809),
    "banana": (954,),
    "apple": (948,),
    "sandwich": (933,),
    "orange": (950,),
    "broccoli": (937,),
    "hot dog": (934,),
    "pizza": (963,),
    "chair": (423, 559, 765),
    "couch": (831,),
    "potted plant": (738,),
    "bed": (564,),
    "dining table": (532,),
    "toilet": (861,),
    "tv": (664, 782, 851),
    "laptop": (620, 681),
    "mouse": (673,),
    "remote": (761,),
    "keyboard": (508,),
    "cell phone": (487,),
    "microwave": (651,),
    "oven": (827,),
    "toaster": (859,),
    "sink": (896,),
    "refrigerator": (760,),
    "book": (917,),
    "clock": (409, 530, 892),
    "vase": (883,),
    "teddy bear": (850,),
    "hair drier": (589,),
}
# By the number of a COCO class.
IMAGENET_KINDS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {NAMES.index(name): kinds for name, kinds in _KINDS.items()}
)


def outlines(path: Path, size: tuple[int, int]) -> dict[int, Bool[Tensor, "height width"]]:
    """Which pixels show objects of each class, from a file of outlines.

    Args:
        path: A line an object: the number of its class, then x and y of its outline in turn, as shares of width and
            height (YOLO's form).
        size: Width and height of the photograph, upright, as PIL has it.

    Raises:
        InputError: Where a line is no outline.
    """
    found: dict[int, Image.Image] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number, *places = line.split()
            corners = [float(place) * length for place, length in zip(places, size * (len(places) // 2), strict=True)]
            drawn = found.setdefault(int(number), Image.new("1", size))
        except ValueError as error:
            raise InputError(f"Expected a class and its outline, x and y in turn; {path} has {line[:60]!r}.") from error
        if len(corners) < 6:
            raise InputError(f"Expected an outline of at least three corners; {path} has {line[:60]!r}.")
        ImageDraw.Draw(drawn).polygon(list(zip(corners[::2], corners[1::2], strict=True)), fill=1)
    return {number: torch.from_numpy(np.array(one)) for number, one in found.items()}
