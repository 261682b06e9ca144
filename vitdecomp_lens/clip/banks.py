"""Texts written for this package: the paper's features, and short descriptions of all that photographs show.

`TextBank.from_open_clip(clip, general(), ...)` makes directions of them. What the testbed's CLIP can read is in
`vitdecomp_lens.testbed.banks`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from types import MappingProxyType

from vitdecomp_lens.clip import words

_WITH_A = re.compile(r"uni|uk|use|eu|one", re.IGNORECASE)  # written with a vowel, spoken with a consonant
_WITH_AN = re.compile(r"[aeiou]|hour|X-", re.IGNORECASE)


def paper_features() -> Mapping[str, tuple[str, ...]]:
    """The features by which the paper scores components (arXiv 2406.01583), and their texts.

    Returns:
        Colour, texture, animal, person, location, pattern, shape and fabric.

    Example:
        >>> paper_features()["colour"][:2]
        ('blue color', 'green color')
    """
    return MappingProxyType(
        {
            "colour": tuple(f"{name} color" for name in _split("blue, green, red, yellow, black, white")),
            "texture": tuple(f"{name} texture" for name in _split("rough, smooth, furry, sleek, slimy, spiky, glossy")),
            "animal": _split("camel, elephant, giraffe, cat, dog, zebra, cheetah"),
            "person": _split("face, head, man, woman, human, arms, legs"),
            "location": _split("sea, beach, forest, desert, city, sky, marsh"),
            "pattern": tuple(f"{name} pattern" for name in _split("spotted, striped, polka dot, plain, checkered")),
            "shape": _split("triangular shape, rectangular shape, circular shape, octagon"),
            "fabric": _split("linen, velvet, cotton, silk, chiffon"),
        }
    )


def paper_waterbirds() -> Mapping[str, tuple[str, ...]]:
    """What the paper ranks components by before it ablates them on Waterbirds (arXiv 2406.01583, Table 3).

    Returns:
        The texts of the ``"spurious"`` and of the ``"core"`` feature.

    Example:
        >>> paper_waterbirds()["core"][:2]
        ('bird', 'finch')
    """
    return MappingProxyType(
        {
            "spurious": _split("water, ocean, lake, sky, land, forest, trees, bamboo, leaves"),
            "core": _split("bird, finch, hummingbird, crow, sparrow, swan, albatross, pelican"),
        }
    )


def general() -> tuple[str, ...]:
    """More than 3,000 short descriptions, for finding out what components of any model are about.

    They are made of this package's own lists of words, each phrase with its article, so that templates such as
    ``"a photo of {}"`` fit them and those of ImageNet do not. The order is always the same.

    Example:
        >>> len(general()) >= 3000, general()[:3]
        (True, ('a cat', 'a kitten', 'a dog'))
    """
    return tuple(text for texts in categories().values() for text in texts)


@lru_cache(maxsize=1)
def categories() -> Mapping[str, tuple[str, ...]]:
    """The texts of `general` by subject. A text stands in one category only, the first that it fits.

    Example:
        >>> list(categories())[:4]
        ['animals', 'plants', 'food', 'vehicles']
    """
    found: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for name, texts in _subjects():
        found[name] = tuple(text for text in dict.fromkeys(texts) if text not in seen)
        seen.update(found[name])
    return MappingProxyType(found)


def _with_article(phrase: str) -> str:
    """A phrase with *a* or *an*, by how it is spoken.

    Example:
        >>> [_with_article(phrase) for phrase in ("cat", "umbrella", "unicorn", "ukulele", "hourglass")]
        ['a cat', 'an umbrella', 'a unicorn', 'a ukulele', 'an hourglass']
    """
    return f"{'an' if _WITH_AN.match(phrase) and not _WITH_A.match(phrase) else 'a'} {phrase}"


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _each(phrases: Iterable[str]) -> Iterator[str]:
    return map(_with_article, phrases)


def _pairs(first: Iterable[str], second: Iterable[str], form: str = "{} {}") -> Iterator[str]:
    """All pairs in a form, with an article."""
    return (_with_article(form.format(*pair)) for pair in product(first, second))


def _plain_pairs(first: Iterable[str], second: Iterable[str], form: str = "{} {}") -> Iterator[str]:
    """All pairs in a form, without an article."""
    return (form.format(*pair) for pair in product(first, second))


def _subjects() -> Iterator[tuple[str, Iterable[str]]]:
    w = words
    yield "animals", _animals()
    yield "plants", [*_each((*w.FLOWERS, *w.TREES, *w.OTHER_PLANTS)), *w.GREENERY]
    yield "food", _food()
    vehicles = (w.ROAD_VEHICLES, w.RAIL_VEHICLES, w.BOATS, w.AIRCRAFT, w.OTHER_VEHICLES)
    yield "vehicles", (text for some in vehicles for text in _each(some))
    yield "things", _things()
    yield "clothes", [*_each(w.CLOTHES), *w.CLOTHES_PAIRED]
    yield "buildings", [*_each(w.BUILDINGS), *_pairs(w.STYLES_OF_BUILDING, ["building"])]
    yield "body parts", [*_each(w.BODY_PARTS), *w.BODY_MANY]
    yield "parts", (f"the {part} of {_with_article(whole)}" for whole, of in w.PARTS.items() for part in _split(of))
    yield "materials", _materials()
    yield "textures", [*_pairs(w.TEXTURES, ["texture"]), *_pairs(w.TEXTURES, ["surface"])]
    yield "colours", _colours()
    yield "patterns", [*_patterned(), *w.MORE_PATTERNS]
    yield "shapes", [*_each(w.SHAPE_NAMES), *_pairs(w.SHAPES, ["object"])]
    yield "places", _places()
    yield "weather", w.WEATHER
    yield "people", _people()
    yield "actions", _actions()
    yield "events", [*_each(w.EVENTS), *(f"an image of {idea}" for idea in w.IDEAS)]
    yield "counts", [*_plain_pairs(w.NUMBERS, w.COUNTED), *w.GROUPS]
    yield "relations", _pairs(w.SMALL_ANIMALS, w.BESIDE)
    yield "camera", [*w.SHOTS, *(f"a close-up of {thing}" for thing in w.CLOSE), *w.LIGHTS]
    yield "style", _styles()
    yield "writing", _writing()


def _animals() -> Iterator[str]:
    w = words
    yield from _each((*w.PETS, *w.BREEDS, *w.GRAZERS, *w.HUNTERS, *w.MAMMALS, *w.BIRDS, *w.FOWL, *w.WATERFOWL))
    yield from _each((*w.SEA_ANIMALS, *w.SHELLFISH, *w.REPTILES, *w.INSECTS, *w.OTHER_ANIMALS))
    yield from _pairs(w.PETS, w.CREATURES_DO)
    yield from _pairs(w.GRAZERS, w.GRAZERS_DO)
    yield from _pairs(w.HUNTERS, w.HUNTERS_DO)
    yield from _pairs(w.BIRDS, w.BIRDS_DO)
    yield from _pairs(w.WATERFOWL, ("on a pond", "under a bridge", "on the grass"))
    yield from _pairs(w.SEA_ANIMALS, w.SWIMMERS_DO)
    yield from _pairs(w.REPTILES[:-1], ("on a rock",))
    yield from _pairs(w.INSECTS, w.INSECTS_DO)


def _food() -> Iterator[str]:
    w = words
    yield from _each((*w.FRUIT, *w.VEGETABLES, *w.BAKED_SINGLE, *w.HANDHELD))
    yield from (*w.GREENS, *w.DISHES, *w.PLATED, *w.STAPLES, *w.DRINKS, *w.HOT_DRINKS)
    yield from (f"a sliced {fruit}" for fruit in w.FRUIT)
    yield from _plain_pairs(("a basket of", "a pile of"), (*w.FRUIT_MANY, *w.VEGETABLES_MANY))
    yield from (f"a slice of {cake}" for cake in w.BAKED)
    yield from (f"a bowl of {dish}" for dish in w.DISHES)
    yield from (f"a plate of {dish}" for dish in w.PLATED)
    yield from (f"a glass of {drink}" for drink in w.DRINKS)
    yield from (f"a cup of {drink}" for drink in w.HOT_DRINKS)


def _things() -> Iterator[str]:
    w = words
    for some in (w.TOOLS, w.WEAPONS, w.FURNITURE, w.KITCHENWARE, w.HOUSEHOLD, w.ELECTRONICS, w.STATIONERY):
        yield from _each(some)
    for some in (w.INSTRUMENTS, w.SPORTS, w.TOYS, w.OTHER_THINGS):
        yield from _each(some)
    yield from w.TOOLS_PAIRED


def _materials() -> Iterator[str]:
    w = words
    yield from (*w.METALS, "wood", *w.STONES, *w.FABRICS, "leather", "glass", "paper", "plastic", "concrete")
    yield from w.SUBSTANCES
    yield from _plain_pairs(w.METAL_LOOKS, w.METALS)
    yield from _plain_pairs(w.STONE_LOOKS, w.STONES)
    yield from _plain_pairs(w.FABRIC_LOOKS, ("fabric", "cotton", "silk", "wool"))
    looks = {"wood": w.WOOD_LOOKS, "leather": w.LEATHER_LOOKS, "glass": w.GLASS_LOOKS, "paper": w.PAPER_LOOKS}
    for material, some in {**looks, "plastic": w.PLASTIC_LOOKS, "concrete": w.CONCRETE_LOOKS}.items():
        yield from _plain_pairs(some, [material])
    for material, things in w.THINGS_OF.items():
        yield from _pairs([material], (" ".join(thing.split()) for thing in things.split(",")))


def _colours() -> Iterator[str]:
    w = words
    yield from (f"the color {colour}" for colour in (*w.COLOURS, *w.MORE_COLOURS))
    yield from _pairs(w.COLOURS, ["background"])
    yield from _pairs(w.COLOURS, w.COLOURED)
    yield from (
        text if text.endswith(("hair", "eyes", "grass", "snow", "water")) else _with_article(text)
        for text in w.COLOURED_BY_NATURE
    )


def _patterned() -> Iterator[str]:
    for pattern, thing in product(words.PATTERNS, words.PATTERNED):
        text = f"{pattern} {thing}"
        yield text if thing in ("fabric", "wallpaper") else _with_article(text)


def _places() -> Iterator[str]:
    w = words
    yield from _each((*w.INDOORS, *w.OUTDOORS, *w.MORE_OUTDOORS))
    yield from _plain_pairs(("inside",), tuple(_each(w.INDOORS)))
    yield from _pairs(w.OUTDOORS, w.TIMES)
    yield from _pairs(w.TEMPERATE, w.SEASONS)
    yield from (f"a street in {city}" for city in w.CITIES)
    yield from (f"a photo taken in {country}" for country in w.COUNTRIES)


def _people() -> Iterator[str]:
    w = words
    yield from _each((*w.PEOPLE, *w.ROLES))
    yield from _pairs((*w.ADULTS, "child"), w.WORN, "{} wearing {}")
    yield from _pairs(w.FEELINGS, ("face", "man", "woman", "child"))
    yield from _pairs(("person",), w.POSES)


def _actions() -> Iterator[str]:
    w = words
    yield from _pairs((*w.ADULTS, *w.CHILDREN), w.ACTIONS)
    yield from _pairs(w.ADULTS, w.ADULT_ACTIONS)
    yield from _pairs(w.CHILDREN, w.CHILD_ACTIONS)
    yield from _plain_pairs(("two people", "a group of people"), w.TOGETHER)
    yield from _pairs(("baby",), ("crawling", "sleeping", "crying", "laughing", "drinking milk", "in a stroller"))


def _styles() -> Iterator[str]:
    for style, subject in product(words.STYLES, words.SUBJECTS):
        name = style if style == "graffiti" else _with_article(style)
        yield f"{name} of {_with_article(subject)}"
    yield from _pairs(words.FIGURES, _each(words.SMALL_ANIMALS), "{} of {}")
    yield from words.OTHER_STYLES


def _writing() -> Iterator[str]:
    yield from (f"the letter {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    yield from (f"the number {number}" for number in range(10))
    yield from (f'a sign that says "{word}"' for word in words.WRITTEN)
    yield from words.WRITINGS
