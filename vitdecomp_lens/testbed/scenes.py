"""Drawn scenes: pictures of which it is known what is in them, and where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitdecomp_lens.errors import InputError, near_matches
from vitdecomp_lens.testbed.captions import caption
from vitdecomp_lens.testbed.drawing import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIDE,
    TURNS,
    as_bytes,
    backgrounds,
    laid_over,
    objects,
    words,
)
from vitdecomp_lens.testbed.hashing import below, mixed, uniform

SPLITS = ("train", "validation", "test", "spurious", "balanced", "typographic", "pairs")
POSITIONS = {
    "left": (14.0, 24.0),
    "right": (34.0, 24.0),
    "top": (24.0, 14.0),
    "bottom": (24.0, 34.0),
    "centre": (24.0, 24.0),
}
SIZES = {"small": (9.0, 10.5), "large": (12.5, 14.5)}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "pattern": tuple(PATTERNS),
    "background": tuple(BACKGROUNDS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
}
ROUND = ("circle", "heart", "ring", "moon")  # the shapes of one group; the others are angular
GROUNDS = ("water", "grass")  # what round and angular shapes lie on in spurious scenes
AGREES = 0.9  # how often they do
SECOND, WORD, OWN_WORD = 0.15, 0.5, 0.8  # shares: scenes with a second object; with a word; words that tell the truth
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@dataclass(frozen=True)
class Scene:
    """A drawn scene and all that is known of it.

    Attributes:
        image: As bytes, ``[3, 48, 48]``.
        masks: Which pixels show ``object``, ``second`` and ``word``; those that there are.
        attributes: Of the object; of a second one as ``second shape``, ...; the ``word``; only what there is.
        caption: A sentence that tells some of it.
    """

    image: UInt8[Tensor, "3 height width"]
    masks: Mapping[str, Bool[Tensor, "height width"]]
    attributes: Mapping[str, str]
    caption: str

    @property
    def picture(self) -> Image.Image:
        """The image as PIL has it."""
        return Image.fromarray(self.image.permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class Drawn:
    """Scenes as numbers: of each attribute which of its values, -1 where there is none.

    Attributes:
        keys: The hash that all else of a scene comes from.
        first: Numbers of the object's attributes.
        second: The same of a second object.
        word: Which shape is written.
    """

    keys: Int[Tensor, "batch"]
    first: Mapping[str, Int[Tensor, "batch"]]
    second: Mapping[str, Int[Tensor, "batch"]]
    word: Int[Tensor, "batch"]


class Scenes(Dataset[Scene]):
    """A set of drawn scenes.

    ``train`` has everything: a second object in 15 % of the scenes, and in half of them a word, which names the
    object's own shape in four of five. ``validation`` and ``test`` have one object and no word. In ``spurious`` round
    shapes lie on water and angular ones on grass in 90 % of the scenes; in ``balanced`` in half of them. All objects
    are small there: mostly one sees what they lie on.
    ``typographic`` has the very scenes of ``test``, with the name of another shape written on them. ``pairs`` have two
    objects.

    Args:
        split: Which kind of scenes.
        seed: Other scenes of this kind.
        size: How many.

    Raises:
        InputError: If there is no such split, or the size is negative.

    Example:
        >>> scene = Scenes("test", seed=1, size=100)[3]
        >>> scene.image.shape, sorted(scene.attributes)
        (torch.Size([3, 48, 48]), ['background', 'colour', 'pattern', 'position', 'shape', 'size'])
    """

    def __init__(self, split: str = "train", *, seed: int = 0, size: int = 1000) -> None:
        if split not in SPLITS:
            raise InputError(f"There are no {split!r} scenes; {near_matches(split, SPLITS)}")
        if size < 0:
            raise InputError(f"size= must not be negative; got {size}.")
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Scene:
        """A scene, drawn when it is asked for."""
        if not -self.size <= index < self.size:
            raise IndexError(f"There are {self.size} scenes; got index {index}.")
        return self.scenes([index % self.size])[0]

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        """Several scenes, drawn together."""
        drawn = self.drawn(indices)
        images, masks = paint(drawn)
        found = []
        for place in range(len(indices)):
            attributes = _named(drawn, place)
            there = {name: mask[place] for name, mask in masks.items() if bool(mask[place].any())}
            found.append(Scene(images[place], there, attributes, caption(attributes, int(drawn.keys[place]))))
        return found

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "batch 3 height width"]:
        """The pictures alone."""
        return paint(self.drawn(indices))[0]

    def read(
        self, indices: Sequence[int]
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], dict[str, Int[Tensor, "batch"]]]:
        """The pictures, and the numbers of all that is known of them, -1 where a scene has none of it."""
        drawn = self.drawn(indices)
        second = {f"second {name}": numbers for name, numbers in drawn.second.items()}
        group = _is_round(drawn.first["shape"]).long()
        return paint(drawn)[0], {**drawn.first, "group": group, **second, "word": drawn.word}

    def captions(self, indices: Sequence[int], *, misread: float = 0.0) -> list[str]:
        """The sentences alone; in a share of the scenes with a word, sentences that call the object what is written."""
        drawn = self.drawn(indices)
        keys = drawn.keys.tolist()
        return [caption(_named(drawn, place), key, misread=misread) for place, key in enumerate(keys)]

    def labels(self, attribute: str, indices: Sequence[int]) -> Int[Tensor, "batch"]:
        """The numbers of one attribute, as in `ATTRIBUTES`; or of ``group``: 1 for round shapes."""
        first = self.drawn(indices).first
        if attribute == "group":
            return _is_round(first["shape"]).long()
        if attribute not in first:
            raise InputError(f"Scenes have no attribute {attribute!r}; {near_matches(attribute, ('group', *first))}")
        return first[attribute]

    def drawn(self, indices: Sequence[int]) -> Drawn:
        """What is in some scenes, as numbers."""
        like = "test" if self.split == "typographic" else self.split
        keys = mixed(self.seed, SPLITS.index(like), torch.as_tensor(list(indices), dtype=torch.int64))
        first = {name: below(_key(keys, name), len(values)) for name, values in ATTRIBUTES.items()}
        if self.split in ("spurious", "balanced"):
            agrees = uniform(_key(keys, "agrees")) < (AGREES if self.split == "spurious" else 0.5)
            grounds = torch.tensor([ATTRIBUTES["background"].index(ground) for ground in GROUNDS])
            first["background"] = torch.where(_is_round(first["shape"]) == agrees, grounds[0], grounds[1])
            first["size"] = torch.full_like(first["size"], ATTRIBUTES["size"].index("small"))
        if self.split == "pairs":  # across from the centre there is no place
            first["position"] = below(_key(keys, "position"), len(OPPOSITE))
        two = {"train": SECOND, "pairs": 1.0}.get(self.split, 0.0)
        second = _second(keys, first, uniform(_key(keys, "two")) < two)
        return Drawn(keys, first, second, self._words(keys, first["shape"]))

    def _words(self, keys: Tensor, shape: Tensor) -> Int[Tensor, "batch"]:
        other = (shape + 1 + below(_key(keys, "other word"), len(SHAPES) - 1)) % len(SHAPES)
        if self.split == "typographic":
            return other
        if self.split != "train":
            return torch.full_like(shape, -1)
        written = torch.where(uniform(_key(keys, "own word")) < OWN_WORD, shape, other)
        return torch.where(uniform(_key(keys, "word")) < WORD, written, -1)


_PURPOSES = (
    *ATTRIBUTES,
    "agrees",
    "two",
    "other word",
    "own word",
    "word",
    "place",
    "radius",
    "turn",
    "plate",
    "ground",
)


def _key(keys: Tensor, purpose: str, number: int = 0) -> Int[Tensor, "batch"]:
    return mixed(keys, _PURPOSES.index(purpose), number)


def _is_round(shape: Tensor) -> Bool[Tensor, "batch"]:
    return torch.tensor([name in ROUND for name in SHAPES])[shape]


def _second(keys: Tensor, first: Mapping[str, Tensor], there: Tensor) -> dict[str, Int[Tensor, "batch"]]:
    """A second object, small, of another shape, colour and pattern, across from the first where that is not central."""
    second = {}
    for name in ("shape", "colour", "pattern"):
        count = len(ATTRIBUTES[name])
        second[name] = (first[name] + 1 + below(_key(keys, name, 1), count - 1)) % count
    positions = ATTRIBUTES["position"]
    across = torch.tensor([positions.index(OPPOSITE.get(name, name)) for name in positions])
    second["position"] = across[first["position"]]
    second["size"] = torch.zeros_like(first["size"])
    there = there & (second["position"] != first["position"])
    return {name: torch.where(there, numbers, -1) for name, numbers in second.items()}


def paint(drawn: Drawn) -> tuple[UInt8[Tensor, "batch 3 height width"], dict[str, Bool[Tensor, "batch height width"]]]:
    """The pictures of scenes, and which pixels show what."""
    picture = backgrounds(drawn.first["background"], _key(drawn.keys, "ground"))
    masks = {}
    for number, (name, kinds) in enumerate({"second": drawn.second, "object": drawn.first}.items()):
        there = kinds["shape"] >= 0
        centre, radius, turn = _placed(drawn.keys, {n: k.clamp_min(0) for n, k in kinds.items()}, number)
        above, cover = objects({n: k.clamp_min(0) for n, k in kinds.items()}, centre, radius, turn)
        cover = torch.where(there[:, None, None], cover, 0.0)
        picture = laid_over(picture, above, cover)
        masks[name] = cover > 0.5
    plate, ink = words(drawn.word, _plate(drawn), list(SHAPES))
    picture = laid_over(laid_over(picture, 0.95, plate.float()), 0.05, ink.float())
    seen = {"second": ~(plate | masks["object"]), "object": ~plate}
    masks = {name: mask & seen[name] for name, mask in masks.items()} | {"word": plate}
    return as_bytes(picture, drawn.keys), masks


def _placed(
    keys: Tensor, kinds: Mapping[str, Tensor], number: int
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Centres, radii and turns of objects, by their positions and sizes."""
    moved = torch.stack([uniform(_key(keys, "place", 2 * number + axis)) * 4 - 2 for axis in range(2)], -1)
    centre = torch.tensor(list(POSITIONS.values()))[kinds["position"]] + moved
    least, most = torch.tensor(list(SIZES.values()))[kinds["size"]].unbind(-1)
    radius = least + (most - least) * uniform(_key(keys, "radius", number))
    return centre, radius, below(_key(keys, "turn", number), len(TURNS))


def _plate(drawn: Drawn) -> Int[Tensor, "batch 2"]:
    """Where words are written: above or below, away from an object there."""
    position = drawn.first["position"]
    names = ATTRIBUTES["position"]
    low = below(_key(drawn.keys, "plate"), 2).bool()
    low = torch.where(position == names.index("top"), True, torch.where(position == names.index("bottom"), False, low))
    left = below(_key(drawn.keys, "plate", 1), 3) * 8
    return torch.stack([left, torch.where(low, SIDE, 0)], -1)


def _named(drawn: Drawn, place: int) -> dict[str, str]:
    """The attributes of one scene by their names."""
    found = {name: ATTRIBUTES[name][int(numbers[place])] for name, numbers in drawn.first.items()}
    if int(drawn.second["shape"][place]) >= 0:
        found |= {f"second {name}": ATTRIBUTES[name][int(numbers[place])] for name, numbers in drawn.second.items()}
    if int(drawn.word[place]) >= 0:
        found["word"] = ATTRIBUTES["shape"][int(drawn.word[place])]
    return found
