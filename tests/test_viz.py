"""Figures: they show the numbers that they were given, where they were told to, and leave nothing behind."""

import io
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
import matplotlib.style
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from vitdecomp_lens import viz
from vitdecomp_lens.applications import ablation
from vitdecomp_lens.applications.ablation import AblationCurve
from vitdecomp_lens.applications.heatmap import Heatmaps
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import Component, TokenGrid
from vitdecomp_lens.decomposition import Attribution
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.interpret import ConceptTree, decompose_by_concepts, score_features
from vitdecomp_lens.testbed.planted import planted_features

ESCAPE = "\x1b[2J$x$ <b>"  # what a terminal, mathematics and a page would act on


@pytest.fixture(scope="module")
def scores():
    planted = planted_features(images=60, d_clip=16, features=3)
    bank = TextBank(["red", "round", ESCAPE], planted.directions, space="planted")
    return score_features(planted.parts, {name: bank.select(name) for name in bank.texts}, bootstrap=0, permutations=0)


LABELS = ("L0H0", "L0H2", "mlp.0", "L2H1", "attn.2", "embed", "norm.bias", "pos_embed")


@pytest.fixture(scope="module")
def attributed():
    values = torch.randn(len(LABELS), 4, 2, generator=torch.Generator().manual_seed(0))
    return Attribution(values, LABELS, values.sum(0), directions=("cat", "dog"))


def curve(values=(1.0, 0.75, 0.5), **more):
    known = {"effect": "direct", "how": "mean", "order": "last first", "seed": 0, "measure": "accuracy", "images": 8}
    return AblationCurve(tuple(f"mlp.{n}" for n in range(len(values) - 1)), values, **{**known, **more})


@pytest.fixture(scope="module")
def maps():
    values = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    return Heatmaps(values, ("a cat", ESCAPE), TokenGrid(4, 5, (32, 40)), "by hand")


def pictures(count=3, size=(40, 32)):
    return [Image.new("RGB", size, colour) for colour in ("green", "red", "blue")[:count]]


TREE = ConceptTree.of(
    {"looks": {"colour": ["red", "blue", "green"], "pattern": ["striped", "solid"]}, "shape": ["star", "ring"]}
)


@pytest.fixture(scope="module")
def parts_of_tree():
    generator = torch.Generator().manual_seed(2)
    texts = [text for several in TREE.texts for text in several]
    bank = TextBank(texts, torch.nn.functional.normalize(torch.randn(len(texts), 12, generator=generator)), space="x")
    return decompose_by_concepts(torch.randn(3, 12, generator=generator, dtype=torch.float64), TREE, bank)


@pytest.fixture
def drawings(scores, attributed, maps, parts_of_tree):
    """Every function, with what it draws."""
    return {
        "matrix": lambda **more: viz.component_feature_matrix(scores, **more),
        "grid": lambda **more: viz.head_grid(attributed, direction="dog", **more),
        "curves": lambda **more: viz.ablation_curves([curve(), curve(order="random")], **more),
        "overlays": lambda **more: viz.heatmap_overlays(maps, pictures(), **more),
        "tree": lambda **more: viz.concept_tree(parts_of_tree, **more),
        "tree alone": lambda **more: viz.concept_tree(TREE, **more),
    }


NAMES = ("matrix", "grid", "curves", "overlays", "tree", "tree alone")


def bar_of(figure):
    """The colour bar: what it says, and where its scale ends."""
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    return bar.get_ylabel().replace("\n", " "), bar.get_ylim()


def labels_of(axes, which):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


# --- what all do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_of_its_own_is_as_wide_as_a_column_and_nobody_elses(drawings, name):
    figure = drawings[name]()
    assert isinstance(figure, Figure)
    assert 3 <= figure.get_figwidth() <= 7
    assert not Gcf.figs  # no window, and none that stays open
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=80)
    pixels = np.asarray(Image.open(written).convert("L"))
    assert pixels.std() > 5  # something was drawn


@pytest.mark.parametrize("name", NAMES)
def test_an_axis_that_is_given_is_drawn_into(drawings, name):
    own = Figure(figsize=(7, 4), layout="constrained")
    left, right = own.subplots(1, 2)
    assert drawings[name](ax=right) is own
    assert right.has_data() or right.child_axes
    assert not left.has_data()
    assert not left.child_axes
    own.savefig(io.BytesIO(), format="png", dpi=60)


def test_an_axis_of_a_part_of_a_figure_will_do(drawings):
    whole = Figure(figsize=(7, 4), layout="constrained")
    part = whole.subfigures(1, 2)[1]
    assert drawings["grid"](ax=part.subplots()) is whole
    assert len(part.axes) == 2  # its colour bar stays there


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_single_axis_is_refused(drawings, name):
    with pytest.raises(InputError, match=r"one axis of matplotlib.*got ndarray"):
        drawings[name](ax=Figure().subplots(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_without_matplotlib_there_is_advice(drawings, name, monkeypatch):
    for module in (viz.axes, ablation):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    with pytest.raises(InputError, match=re.escape("pip install 'vitdecomp-lens[viz]'")):
        drawings[name]()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_stays_readable_on_a_dark_ground(drawings, name):
    with matplotlib.style.context("dark_background"):
        figure = drawings[name]()
        figure.draw_without_rendering()
    cells = name in ("matrix", "grid")  # their numbers lie on colours
    for text in figure.findobj(Text):
        if text.get_text() and not (cells and text in figure.axes[0].texts):
            assert min(to_rgb(text.get_color())) > 0.9, text.get_text()
            assert text.get_alpha() in (None, 1, viz.axes.QUIET)


def test_names_of_ten_thousand_letters_leave_room_for_the_figure(scores, maps, drawings):
    name = "a photograph of " * 700
    named = replace(scores, features=("red", "round", name))
    drawn = {
        "matrix": viz.component_feature_matrix(named, most=1),
        "grid": viz.head_grid({"L0H0": 1.0}, unit=name),
        "curves": viz.ablation_curves([curve(), curve()], names=[name, "_b"]),
        "overlays": viz.heatmap_overlays(replace(maps, texts=(name, "b")), pictures(), names=[name] * 3, unit=name),
        "tree": viz.concept_tree(ConceptTree.of({name: ["red", name + "b"]})),
    }
    for which, figure in drawn.items():
        assert figure.get_figwidth() <= 7, which
        assert max(len(text.get_text()) for text in figure.findobj(Text)) < 80, which
        figure.draw_without_rendering()
        (height,) = {axes.bbox.height / figure.dpi for axes in figure.axes[:1]}
        assert height > 0.7, which
    legend = drawn["curves"].axes[0].get_legend().get_texts()
    assert [text.get_text()[:2] for text in legend] == ["a ", "_b"]


# --- components by feature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["correlation", "covariance", "share"])
def test_a_matrix_shows_the_scores(scores, by):
    figure = viz.component_feature_matrix(scores, by=by, most=100)
    axes = figure.axes[0]
    wanted = scores.covariance / scores.total if by == "share" else getattr(scores, by)
    drawn = axes.images[0]
    np.testing.assert_allclose(drawn.get_array(), wanted, atol=1e-12)
    assert labels_of(axes, "y") == list(scores.labels)
    assert labels_of(axes, "x") == ["red", "round", r"\x1b[2J$x$ <b>"]
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    assert float(drawn.norm(0.0)) == 0.5
    title, ends = bar_of(figure)
    assert title == viz.matrix.UNITS[by]
    assert ends == pytest.approx((-float(wanted.abs().max()), float(wanted.abs().max())))
    assert axes.get_xlabel() == ""


def test_a_matrix_of_some_components_is_in_their_order_and_says_how_many_there_are(scores):
    few = [scores.labels[3], scores.labels[0]]
    axes = viz.component_feature_matrix(scores, components=few, features=["round", "red"]).axes[0]
    wanted = scores.correlation[[3, 0]][:, [1, 0]]
    np.testing.assert_allclose(axes.images[0].get_array(), wanted, atol=1e-12)
    assert (labels_of(axes, "y"), labels_of(axes, "x")) == (few, ["round", "red"])
    assert axes.get_xlabel() == f"2 of {len(scores)} components"


def test_a_matrix_takes_those_of_the_highest_scores_in_the_order_of_the_model(scores):
    drawn = labels_of(viz.component_feature_matrix(scores, most=4).axes[0], "y")
    largest = scores.correlation.abs().amax(1)
    assert set(drawn) == {scores.labels[row] for row in largest.topk(4).indices.tolist()}
    assert drawn == [label for label in scores.labels if label in drawn]


def test_constants_have_a_row_only_where_they_are_named(scores):
    with_constant = replace(scores, components=("pos_embed", *scores.components[1:]))
    assert labels_of(viz.component_feature_matrix(with_constant).axes[0], "y") == list(scores.labels[1:])
    named = viz.component_feature_matrix(with_constant, components=["pos_embed"])
    assert labels_of(named.axes[0], "y") == ["pos_embed"]


def test_a_feature_that_does_not_vary_has_hatched_cells(scores):
    still = replace(scores, total=scores.total * torch.tensor([1.0, 0.0, 1.0]))
    axes = viz.component_feature_matrix(still, by="share", most=4).axes[0]
    drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.isnan(drawn[:, 1]).all()
    assert np.isfinite(drawn[:, [0, 2]]).all()
    shares = (scores.covariance / scores.total)[:, [0, 2]].abs().amax(1)
    assert set(labels_of(axes, "y")) == {scores.labels[row] for row in shares.topk(4).indices.tolist()}
    with pytest.raises(InputError, match="Expected numbers to draw"):
        viz.component_feature_matrix(still, by="share", features=["round"])


def test_numbers_are_written_into_few_columns_only(scores):
    def written(**more):
        return [text.get_text() for text in viz.component_feature_matrix(scores, **more).axes[0].texts]

    first, second = (float(value) for value in scores.correlation[0, :2])
    for text, value in zip(
        written(components=scores.labels[:1], features=["red", "round"]), (first, second), strict=True
    ):
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=0.00501)
    assert written(numbers=False) == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"by": "size"}, InputError, "'correlation', 'covariance', 'share'; got 'size'"),
        ({"features": ["redd"]}, UnknownNameError, "no feature 'redd'"),
        ({"features": []}, InputError, "Expected numbers to draw"),
        ({"components": ["L9H9"]}, UnknownNameError, "no component 'L9H9'"),
        ({"most": 0}, InputError, "most= of at least 1"),
    ],
)
def test_a_matrix_refuses(scores, options, error, said):
    with pytest.raises(error, match=said):
        viz.component_feature_matrix(scores, **options)


# --- layers by heads --------------------------------------------------------------------------------------------------


def test_a_grid_has_a_row_a_layer_and_hatching_where_there_is_nothing(attributed):
    figure = viz.head_grid(attributed, direction="dog", image=2)
    axes = figure.axes[0]
    score = {label: float(attributed[label][2, 1]) for label in LABELS}
    none = np.nan
    wanted = [
        [score["L0H0"], none, score["L0H2"], none, score["mlp.0"]],
        [none, score["L2H1"], none, score["attn.2"], none],
    ]
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), wanted, atol=1e-7)
    assert (labels_of(axes, "y"), labels_of(axes, "x")) == (["0", "2"], ["0", "1", "2", "attention", "MLP"])
    assert axes.patch.get_hatch()
    constants = score["norm.bias"] + score["pos_embed"]
    assert axes.get_xlabel().replace("−", "-") == (
        f"head\nwithout a layer: embed {score['embed']:+.2f}, constant {constants:+.2f}"
    )
    assert bar_of(figure)[0] == "score of dog"


def test_a_grid_shows_the_mean_of_all_images(attributed):
    figure = viz.head_grid(attributed, direction=0, unit="logit")
    assert figure.axes[0].images[0].get_array()[0, 0] == pytest.approx(float(attributed["L0H0"][:, 0].mean()))
    assert bar_of(figure)[0] == "logit, mean of 4 images"


def test_a_grid_of_any_numbers(scores):
    by_label = dict(scores.top("red", len(scores)))
    axes = viz.head_grid(by_label, unit="correlation").axes[0]
    drawn = axes.images[0].get_array()
    rows, columns = labels_of(axes, "y"), labels_of(axes, "x")
    heads = {label: value for label, value in by_label.items() if label.startswith("L")}
    assert heads
    for label, value in heads.items():
        layer, head = label[1:].split("H")
        assert drawn[rows.index(layer), columns.index(head)] == pytest.approx(value)
    assert axes.get_xlabel() == "head"  # of numbers that do not add up, no sum is told


def test_a_grid_of_many_heads_is_wide_enough_for_their_numbers():
    heads = {f"L{layer}H{head}": 1.0 for layer in range(24) for head in range(16)}
    figure = viz.head_grid(heads | {f"mlp.{layer}": -1.0 for layer in range(24)})
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 17
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_names_tell_rows_apart_where_layers_do_not():
    def drawn(*components):
        values = torch.arange(float(len(components)))[:, None, None]
        axes = viz.head_grid(Attribution(values, components)).axes[0]
        return labels_of(axes, "y"), axes.images[0].get_array().tolist()

    heads = [Component("head", 3, n, name="blocks.3.attn") for n in range(2)]
    assert drawn(*heads, Component("mlp", 3, name="blocks.3.mlp")) == (["3"], [[0, 1, 2]])
    beside = [Component("head", 3, n, name="blocks.3.other") for n in range(2)]
    assert drawn(*heads, *beside) == (["blocks.3.attn", "blocks.3.other"], [[0, 1], [2, 3]])
    nowhere = [Component("mlp", name="first"), Component("mlp", name="second")]
    assert drawn(*nowhere) == (["first", "second"], [[0], [1]])
    many = [Component("mlp", name=f"blocks.{n}.mlp") for n in (10, 9, 2)]
    assert drawn(*many) == (["blocks.2.mlp", "blocks.9.mlp", "blocks.10.mlp"], [[2], [1], [0]])


def test_a_grid_without_heads_does_not_speak_of_any():
    axes = viz.head_grid({"attn.0": 1.0, "mlp.0": 0.5}).axes[0]
    assert labels_of(axes, "x") == ["attention", "MLP"]
    assert axes.get_xlabel() == ""


@pytest.mark.parametrize(
    ("values", "options", "error", "said"),
    [
        (None, {}, InputError, "direction=, one of 'cat', 'dog'"),
        (None, {"direction": "dogg"}, UnknownNameError, "no direction 'dogg'"),
        (None, {"direction": 2}, UnknownNameError, "no direction 2; there are 2"),
        (None, {"direction": 0, "image": 4}, InputError, "an image from 0 to 3; got 4"),
        ({"L0H0": 1.0}, {"direction": 0}, InputError, "are for an Attribution"),
        ({"embed": 1.0}, {}, InputError, "at least one head"),
        ({}, {}, InputError, "at least one head"),
        ({"L0N3": 1.0}, {}, InputError, "'L0N3' is a neuron"),
        ({"L0H0": float("nan")}, {}, InputError, "numbers to draw"),
    ],
)
def test_a_grid_refuses(attributed, values, options, error, said):
    with pytest.raises(error, match=said):
        viz.head_grid(attributed if values is None else values, **options)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_ablation_in_colours_that_differ():
    total = curve((1.0, 0.9), effect="total")
    several = [curve(), curve(order="random"), total, curve(order="random", seed=1)]
    axes = viz.ablation_curves(several).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [list(one.values) for one in several]
    assert [list(line.get_xdata()) for line in axes.lines] == [list(range(len(one.values))) for one in several]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "-"]
    colours = [to_hex(line.get_color()) for line in axes.lines]
    assert len(set(colours)) == 3
    assert [colours[0], colours[2]] == [colour.lower() for colour in viz.curves.LINES[:2]]
    assert colours[1] == colours[3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [one.name for one in several]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("components ablated", "accuracy")


def test_curves_have_the_names_that_they_are_given():
    legend = viz.ablation_curves([curve()], names=["$x$"]).axes[0].get_legend()
    assert [(text.get_text(), text.get_parse_math()) for text in legend.get_texts()] == [("$x$", False)]


def test_curves_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="one measure"):
        viz.ablation_curves([curve(), curve(measure="loss")])
    with pytest.raises(InputError, match="at least one curve"):
        viz.ablation_curves([])


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def test_overlays_show_each_map_on_its_photograph_on_one_scale(maps):
    figure = viz.heatmap_overlays(maps, pictures(), names=["first", "second", "third"], unit="logit a patch")
    panels = np.array(figure.axes[0].child_axes).reshape(3, 3)
    for row in range(3):
        assert len(panels[row, 0].images) == 1
        for column in range(2):
            below, drawn = panels[row, column + 1].images
            np.testing.assert_allclose(drawn.get_array(), maps.values[row, column], atol=1e-7)
            assert drawn.get_extent() == below.get_extent() == [0, 40, 32, 0]
            assert drawn.get_clim() == panels[0, 1].images[1].get_clim()
    assert [panel.get_title() for panel in panels[0]] == ["image", "a cat", "\\x1b[2J$x$ <b>"]
    assert [panel.get_ylabel() for panel in panels[:, 0]] == ["first", "second", "third"]
    title, (low, high) = bar_of(figure)
    assert title == "logit a patch"
    assert low == -high
    assert high == pytest.approx(np.percentile(maps.values.abs(), 99.5), rel=1e-5)


def test_overlays_lie_where_the_model_looked(maps):
    seen = [(4.0, 0.0, 44.0, 32.0)] * 3
    figure = viz.heatmap_overlays(maps, pictures(size=(60, 32)), seen=seen)
    assert figure.axes[0].child_axes[1].images[1].get_extent() == [4, 44, 32, 0]
    padded = Heatmaps(maps.values, maps.texts, TokenGrid(4, 5, (32, 40), seen=(32, 20)), "by hand")
    figure = viz.heatmap_overlays(padded, pictures(size=(60, 32)), seen=seen)
    assert figure.axes[0].child_axes[1].images[1].get_extent() == [4, 84, 32, 0]  # twice as wide as what is seen


@pytest.mark.parametrize("options", [{"seen": []}, {"names": ["one"]}, {}])
def test_overlays_need_a_photograph_an_image(maps, options):
    with pytest.raises(InputError, match="for each of the 3 images"):
        viz.heatmap_overlays(maps, pictures(3 if options else 2), **options)


# --- trees ------------------------------------------------------------------------------------------------------------


def branches(figure):
    """Names in their order, and the widths of their bars."""
    left, *right = figure.axes[0].child_axes
    widths = [bar.get_width() for axes in right for bar in axes.patches]
    return [text.get_text() for text in left.texts], widths


def test_a_tree_shows_the_shares_of_an_image(parts_of_tree):
    names, widths = branches(viz.concept_tree(parts_of_tree, image=1, threshold=0.0))
    shown = dict(zip(names, widths, strict=True))
    for name in TREE.names:
        assert shown[name] == pytest.approx(100 * float(parts_of_tree.share(name)[0, 1]), abs=1e-9)
    assert shown["(remainder)"] == pytest.approx(100 * float(parts_of_tree.remainder_share()[0, 1]), abs=1e-9)
    assert shown["looks"] + shown["shape"] + shown["(remainder)"] == pytest.approx(100)
    # What `show` says, line by line.
    told = parts_of_tree.show(1, threshold=0.0).splitlines()[1:]
    lines = [re.search(r"([−\d.]+) % (.*)", line).groups() for line in told]
    assert [name for _, name in lines] == names
    assert [float(share.replace("−", "-")) for share, _ in lines] == pytest.approx(widths, abs=0.0501)


def test_a_tree_counts_small_concepts_together_and_ends_where_it_is_told(parts_of_tree):
    for options in ({"threshold": 0.2}, {"threshold": 0.0, "levels": 1}, {"threshold": 0.05, "levels": 2}):
        names, _ = branches(viz.concept_tree(parts_of_tree, **options))
        told = parts_of_tree.show(0, **options).splitlines()[1:]
        assert names == [re.search(r"% (.*)", line)[1] for line in told]


def test_a_tree_alone_has_its_concepts_below_what_they_refine():
    names, widths = branches(viz.concept_tree(TREE))
    assert names == ["looks", "colour", "red", "blue", "green", "pattern", "striped", "solid", "shape", "star", "ring"]
    assert widths == []
    assert branches(viz.concept_tree(TREE, levels=1))[0] == ["looks", "shape"]
    (left,) = viz.concept_tree(TREE).axes[0].child_axes
    places = {text.get_text(): text.get_position() for text in left.texts}
    assert places["looks"][0] < places["colour"][0] == places["pattern"][0] < places["red"][0]


def test_a_tree_refuses(parts_of_tree):
    with pytest.raises(InputError, match="an image from 0 to 2; got 3"):
        viz.concept_tree(parts_of_tree, image=3)
    with pytest.raises(UnknownNameError, match="no component 'L0H0'"):
        viz.concept_tree(parts_of_tree, component="L0H0")
