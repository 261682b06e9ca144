"""``vitdecomp-lens interpret``: what components, features and images have to do with each other, in words."""

from typing import Any

from vitdecomp_lens.commands.interpreting import compare, component, feature, image

QUESTIONS = (component, feature, image, compare)  # as the help lists them


def add_to(commands: Any) -> None:
    """Add the command, with a command of its own for each question."""
    parser = commands.add_parser(
        "interpret",
        help="say in words what components write",
        description="Say in words what a component writes, which components carry a feature, what an image shows and "
        "what says so, and how models differ. Contributions come from a store, or from a model that is decomposed now; "
        "those that are not a CLIP's own are taken into its space by an aligner.",
    )
    questions = parser.add_subparsers(required=True, metavar="QUESTION")
    for question in QUESTIONS:
        question.add_to(questions)
