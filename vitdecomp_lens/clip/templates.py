"""Sentences that texts are put into before a CLIP embeds them; ``{}`` is where a text goes."""

SIMPLE = ("{}", "a photo of {}", "a picture of {}", "an image that shows {}")


def imagenet() -> tuple[str, ...]:
    """The 80 templates for ImageNet's classes that CLIP's authors chose, as open_clip ships them.

    The paper averages over these (arXiv 2406.01583). They expect a class's name without an article.

    Returns:
        In open_clip's order.

    Example:
        >>> len(imagenet()), imagenet()[0].format("cat")
        (80, 'a bad photo of a cat.')
    """
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
