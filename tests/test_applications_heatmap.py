"""Heatmaps: what they sum, how they are held against masks, and the baselines, each against an independent oracle."""

import importlib.util
import warnings
from dataclasses import replace

import matplotlib.image
import pytest
import staged_models
import torch
from foreign_vit import ForeignViT
from labelled_samples import as_users_run_it, token_sample
from PIL import Image
from sklearn.metrics import average_precision_score
from staged_models import STAGED_MODELS
from tiny_models import TINY_MODELS, images_for, perturb
from torch.nn import functional

from vitdecomp_lens import HookedViT, attribute_tokens, decompose, testbed
from vitdecomp_lens.applications import heatmap
from vitdecomp_lens.applications.heatmap import ANY, OWN, Heatmaps, making
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.components import TokenGrid
from vitdecomp_lens.errors import InputError, UnknownNameError, UnsupportedModelError, VitDecompWarning
from vitdecomp_lens.testbed import banks
from vitdecomp_lens.testbed.planted import planted_tokens

PATCH = 8


def tiny(name="class_token", count=2):
    return HookedViT(TINY_MODELS[name]().double()), images_for(name, count).double()


def over_pixels(masks):
    return masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def some_maps(batch=3, texts=2, *, rows=4, columns=6, seed=0):
    values = torch.randn(batch, texts, rows, columns, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"text {n}" for n in range(texts))
    return Heatmaps(values.double(), names, TokenGrid(rows, columns, (rows * PATCH, columns * PATCH)), "by hand")


def some_masks(batch=3, height=32, width=48, seed=1):
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < 0.3


# ---- planted truth


@pytest.mark.parametrize("seed", range(3))
def test_planted_tokens_are_segmented(seed):
    planted, other = (planted_tokens(images=60, seed=seed, draw=draw) for draw in (0, 1))
    maps, validation = (
        heatmap.from_tokens(one.tokens, components=[one.carrier]).picked([one.text] * 60) for one in (planted, other)
    )
    threshold = heatmap.choose_threshold(validation, over_pixels(other.masks), resize="nearest")
    masks = over_pixels(planted.masks)
    found = heatmap.segment(maps, masks, threshold=threshold, resize="nearest")
    assert threshold == "otsu"
    assert found.miou >= 0.95
    assert found.pixel_accuracy >= 0.97
    assert found.mean_average_precision >= 0.97
    # Where objects are small, noise lies above the mean: the paper's threshold loses what the map itself does not.
    paper = heatmap.segment(maps, masks, resize="nearest")
    assert 0.75 < paper.miou < found.miou
    assert paper.mean_average_precision == found.mean_average_precision
    assert bool(heatmap.hits(maps, masks, resize="nearest").all())


@pytest.mark.parametrize("seed", range(3))
def test_planted_tokens_of_little_noise_are_segmented_by_the_papers_threshold(seed):
    planted = planted_tokens(images=60, seed=seed, noise=0.02)
    maps = heatmap.from_tokens(planted.tokens, components=[planted.carrier]).picked([planted.text] * 60)
    assert heatmap.segment(maps, over_pixels(planted.masks), resize="nearest").miou >= 0.95


def test_otsus_threshold_is_that_of_all_partings():
    pixels = some_maps(3, 1).to_pixels(5, 5, resize="nearest")[:, 0]
    pixels[1] = pixels[1].round()
    for values, found in zip(pixels.clamp(min=0), heatmap.foreground(pixels, threshold="otsu"), strict=True):
        tried = {}
        for level in values.unique()[1:].tolist():
            upper, lower = values[values >= level], values[values < level]
            tried[level] = len(upper) * len(lower) * float(upper.mean() - lower.mean()) ** 2
        assert torch.equal(found, values >= max(tried, key=tried.get))
    assert heatmap.foreground(torch.ones(1, 3, 3), threshold="otsu").all()
    assert not heatmap.foreground(torch.zeros(1, 3, 3), threshold="otsu").any()


def test_planted_tokens_are_segmented_by_all_heads_where_there_is_no_noise():
    planted = planted_tokens(images=30, noise=0.0)
    maps = heatmap.from_tokens(planted.tokens).picked([planted.text] * 30)
    assert heatmap.segment(maps, over_pixels(planted.masks), resize="nearest").miou == 1
    linear = heatmap.segment(maps, over_pixels(planted.masks))
    assert 0.7 < linear.miou < 1  # between centres, edges are not where patches end
    assert heatmap.segment(maps.images(slice(0, 9)), over_pixels(planted.masks)[:9], resize="nearest").miou == 1


# ---- what maps sum


def test_a_map_is_the_sum_over_components_of_their_scores_by_patch():
    tokens = token_sample(coarse_only=True)
    maps = heatmap.from_tokens(tokens, components="all")
    expected = tokens.values.sum(0)[:, 2:].reshape(3, 2, 3, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps.values, expected)
    assert maps.texts == ("a dog", "a cat")
    heads = heatmap.from_tokens(tokens)
    torch.testing.assert_close(heads.values, heatmap.from_tokens(tokens.select(kind="head"), components="all").values)
    one = heatmap.from_tokens(tokens, components="L1H1")
    torch.testing.assert_close(one["a cat"], tokens["L1H1"][:, 2:, 1].reshape(3, 2, 3))


def test_what_is_written_against_a_text_need_not_count():
    tokens = token_sample(coarse_only=True)
    values = tokens.values[:, :, 2:].reshape(-1, 3, 2, 3, 2).permute(0, 1, 4, 2, 3)
    positive = heatmap.from_tokens(tokens, components="all", how="positive")
    torch.testing.assert_close(positive.values, values.clamp(min=0).sum(0))
    strength = heatmap.from_tokens(tokens, components="all", how="strength")
    torch.testing.assert_close(strength.values, values.square().sum(2, keepdim=True).sqrt().sum(0))
    assert (positive.texts, strength.texts) == (("a dog", "a cat"), (ANY,))
    assert (positive.method, strength.method) == ("decomposition, positive", "decomposition, strength")


def test_a_model_has_maps_of_what_counts():
    model, images = tiny(count=3)
    bank = TextBank(["a", "b"], torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), space="drawn")
    tokens = attribute_tokens(model, images, bank.directions.double())
    for how in ("positive", "strength"):
        expected = heatmap.from_tokens(tokens, how=how)
        found = heatmap.of_texts(model, images, bank, how=how, batch_size=2)
        torch.testing.assert_close(found.values, expected.values)
        assert found.texts == (bank.texts if how == "positive" else (ANY,))
        (logits,) = heatmap.tokens_of_classes(model, images, [3, 7])
        classes = heatmap.of_classes(model, images, [3, 7], how=how)
        torch.testing.assert_close(classes.values, heatmap.from_tokens(logits, how=how).values)


def test_coarser_tokens_are_spread_over_the_finest_patches():
    tokens = token_sample()
    maps = heatmap.from_tokens(tokens, components="all")
    assert maps.values.shape == (3, 2, 4, 6)
    fine, coarse = (heatmap.from_tokens(replace(tokens, blocks=(b,)), components="all") for b in tokens.blocks)
    spread = coarse.values.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    torch.testing.assert_close(maps.values, fine.values + spread)


@pytest.mark.parametrize("name", ["class_token", "mean_pool_fc_norm", "dinov2_reg"])
def test_maps_of_a_model_are_its_scores_by_token(name):
    model, images = tiny(name, 3)
    bank = TextBank(["a", "b", "c"], torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), space="drawn")
    directions = bank.directions.double()
    tokens = attribute_tokens(model, images, directions)
    prefix = len(tokens.grid.prefix)
    values = tokens.select(kind="head").values.sum(0)[:, prefix:].transpose(1, 2).reshape(3, 3, 4, 4)
    for size in (1, 2, 32):
        maps = heatmap.of_texts(model, images, bank, batch_size=size)
        torch.testing.assert_close(maps.values, values)
    whole = heatmap.of_texts(model, images, bank, components="all").values.sum((2, 3))
    outside = tokens.untokened.values.sum(0) + sum(b.values[:, :, :prefix].sum((0, 2)) for b in tokens.blocks)
    torch.testing.assert_close(whole + outside, tokens.total)
    layers = heatmap.of_texts(model, images, bank, by="layer")
    torch.testing.assert_close(layers.values, values)


def any_model(name):
    """A catalogue's model, or somebody else's, or one that is only traced."""
    if name in STAGED_MODELS:
        return staged_models.shared(name)
    if name == "foreign":
        model = perturb(ForeignViT()).double()
        return model, torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if name == "traced":
        return TINY_MODELS["class_token"]().double(), images_for("class_token", 2).double()
    return tiny(name)


EVERY_KIND = ["class_token", "mean_pool_fc_norm", "siglip", "parallel_things", "cait", "xcit", "traced", "foreign"]


@pytest.mark.filterwarnings("ignore:.*The slow replay takes its place")
@pytest.mark.parametrize("components", ["attention", "all"])
@pytest.mark.parametrize(
    "name", [*EVERY_KIND, *(pytest.param(name, marks=pytest.mark.sweep) for name in ("swin_padded", "maxvit", "hiera"))]
)
def test_signed_maps_are_the_sums_over_heads_though_layers_are_read_whole(name, components):
    model, images = any_model(name)
    width = decompose(model, images[:1], components=["embed"]).values.shape[-1]
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    bank = TextBank(["a", "b", "c"], vectors, space="drawn")
    tokens = attribute_tokens(model, images, bank.directions.double())
    expected = heatmap.from_tokens(tokens, components=components)
    maps = heatmap.of_texts(model, images, bank, components=components)
    unit = float(expected.values.abs().max())
    torch.testing.assert_close(maps.values / unit, expected.values / unit, atol=1e-12, rtol=0)
    assert (maps.texts, maps.grid) == (bank.texts, expected.grid)


def test_layers_are_read_whole_only_where_heads_count_alike(monkeypatch):
    model, images = tiny()
    asked = []

    def spy(*of, by, **options):
        asked.append(by)
        return attribute_tokens(*of, by=by, **options)

    monkeypatch.setattr(making, "attribute_tokens", spy)
    bank = TextBank(["a", "b"], torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), space="drawn")
    random = TextBank([f"{n}" for n in range(30)], torch.randn(30, 32), space="drawn")
    heatmap.of_texts(model, images, bank)
    heatmap.of_classes(model, images, [3])
    assert asked == ["layer", "layer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VitDecompWarning)
        heatmap.of_texts(model, images, bank, null=random)  # which component carries a text is asked by head
    for options in ({"how": "positive"}, {"components": ["L0H1"]}, {"by": "neuron"}):
        heatmap.of_texts(model, images, bank, **options)
    assert asked[2:] == ["head", "head", "head", "neuron"]


def test_texts_are_held_against_others():
    model, images = tiny()
    bank = TextBank(["a", "b", "c"], torch.randn(3, 32), space="drawn")
    maps = heatmap.of_texts(model, images, bank)
    torch.testing.assert_close(heatmap.of_texts(model, images, bank, against=bank).values, maps.relative().values)
    others = TextBank(["d", "b"], torch.randn(2, 32), space="drawn")
    against = heatmap.of_texts(model, images, bank, against=others)
    both = heatmap.of_texts(model, images, TextBank(["d", "e"], others.directions, space="drawn"))
    torch.testing.assert_close(against["a"], maps["a"] - both.values.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(against["b"], maps["b"] - both["d"], atol=1e-6, rtol=1e-5)


def test_classes_are_maps_of_logits():
    model, images = tiny()
    maps = heatmap.of_classes(model, images, [3, 7])
    rows = torch.eye(10, dtype=torch.float64)
    tokens = attribute_tokens(model, images, rows, of="logits").select(kind="head")
    values = tokens.values.sum(0)[:, 1:].transpose(1, 2).reshape(2, 10, 4, 4)
    torch.testing.assert_close(maps.values, values[:, [3, 7]])
    relative = heatmap.of_classes(model, images, [3, 7], relative=True)
    torch.testing.assert_close(relative.values, (values - values.mean(1, keepdim=True))[:, [3, 7]])


def test_a_class_is_held_against_those_that_answer_its_question():
    model = testbed.load("deit")
    images = testbed.normalised(testbed.Scenes("test").images(range(2)))
    shapes = testbed.scenes.ATTRIBUTES["shape"]
    relative = heatmap.of_classes(model, images, ["circle"], relative=True)
    plain = heatmap.of_classes(model, images, list(shapes))
    torch.testing.assert_close(relative["circle"], plain["circle"] - plain.values.mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["swin", "maxvit", "reg"])
def test_models_of_all_kinds_have_maps_through_their_aligners(name):
    images = testbed.normalised(testbed.Scenes("test").images(range(2)))
    aligner = testbed.aligners.aligner(name)
    bank = TextBank(["a", "b"], torch.randn(2, 64), space=aligner.space)
    model = testbed.load(name)
    maps = heatmap.of_texts(model, images, bank, through=aligner)
    tokens = attribute_tokens(model, images, bank.directions, through=aligner)
    heads = [label for label in tokens.labels if "H" in label]
    expected = tokens.select(labels=heads).to_pixels(48, 48, mode="density").sum(0)
    torch.testing.assert_close(maps.to_pixels(48, 48, resize="density"), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="Expected the space of this bank"):
        heatmap.of_texts(model, images, TextBank(["a"], torch.ones(1, 64), space="other"), through=aligner)


# ---- texts that no component carries


def planted_model_texts():
    """A model whose attention writes into half of its representation's dimensions, after which a mean is read."""
    module = TINY_MODELS["no_prefix_no_norm"]().double()
    for block in module.blocks:
        for part in (block.attn.proj.weight, block.attn.proj.bias):
            part.data[16:] = 0
    return HookedViT(module), images_for("no_prefix_no_norm", 4).double()


def test_a_text_that_no_component_carries_is_told_with_the_level_of_random_texts():
    model, images = planted_model_texts()
    chance = torch.Generator().manual_seed(0)
    random = TextBank([f"random {n}" for n in range(99)], torch.randn(99, 32, generator=chance), space="drawn")
    outside = torch.randn(32, generator=chance)
    outside[:16] = 0
    bank = TextBank(["absent"], outside[None], space="drawn")
    with pytest.warns(VitDecompWarning, match="No component carries these texts .*'absent': strongest in L"):
        lacking = heatmap.of_texts(model, images, bank, null=random).carried
    assert lacking.lacking == ("absent",)
    assert float(lacking.p) > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = attribute_tokens(model, images, torch.eye(32).double()).select(kind="head")
        axis = tokens.values[0].flatten(0, 1).T.cov().double()  # the direction that one head varies most along
        best = torch.linalg.eigh(axis).eigenvectors[:, -1:].T
        carried = heatmap.of_texts(model, images, TextBank(["there"], best, space="drawn"), null=random).carried
    assert carried.lacking == ()
    assert float(carried.strength) > float(carried.null) > 0
    assert float(carried.p) == pytest.approx(0.01)


def test_random_texts_are_told_in_a_twentieth_of_all_cases():
    model, images = tiny(count=3)
    chance = torch.Generator().manual_seed(2)
    random, asked = (
        TextBank([f"{name} {n}" for n in range(count)], torch.randn(count, 32, generator=chance), space="drawn")
        for name, count in (("random", 199), ("asked", 300))
    )
    with pytest.warns(VitDecompWarning, match="and 2.. more"):
        carried = heatmap.of_texts(model, images, asked, null=random).carried
    assert 0.01 < 1 - len(carried.lacking) / 300 < 0.12
    assert carried.draws == 199


# ---- over pixels


def test_linear_pixels_are_torchs_bilinear_ones():
    maps = some_maps()
    for height, width in ((32, 48), (33, 50), (4, 6), (3, 3)):
        expected = functional.interpolate(maps.values, (height, width), mode="bilinear", align_corners=False)
        torch.testing.assert_close(maps.to_pixels(height, width), expected)
    assert maps.to_pixels().shape == (3, 2, 32, 48)
    nearest = maps.to_pixels(resize="nearest")
    assert torch.equal(nearest, maps.values.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3))
    torch.testing.assert_close(maps.to_pixels(17, 31, resize="density").sum((2, 3)), maps.values.sum((2, 3)))


def test_where_patches_reach_beyond_the_image_pixels_do_not():
    maps = some_maps()
    padded = replace(maps, grid=TokenGrid(4, 6, (32, 48), seen=(30, 40)))
    for resize in ("linear", "nearest"):
        whole = maps.to_pixels(resize=resize)
        torch.testing.assert_close(padded.to_pixels(resize=resize), whole[:, :, :30, :40])


def test_maps_go_back_onto_the_photograph():
    maps = some_maps()
    laid = maps.on_photograph(1, (100, 80), (26.0, 24.0, 74.0, 56.0))
    assert laid.shape == (2, 80, 100)
    torch.testing.assert_close(laid[:, 24:56, 26:74], maps.to_pixels()[1])
    assert int(laid[0].isfinite().sum()) == 32 * 48


def test_masks_are_cropped_and_resized_as_the_model_sees_the_photograph():
    mask = torch.rand(80, 100) < 0.5
    seen = heatmap.as_seen(mask, (26.0, 24.0, 74.0, 56.0), (32, 48))
    assert torch.equal(seen, mask[24:56, 26:74])
    small = heatmap.as_seen(mask, (26.0, 24.0, 74.0, 56.0), (16, 24))
    assert torch.equal(small, mask[25:56:2, 27:74:2])
    assert not heatmap.as_seen(mask, (-10.0, 0.0, 0.0, 10.0), (10, 10)).any()


# ---- measures


def by_hand(pixels, masks, threshold):
    """The measures as published code has them, in plain loops."""
    both, either, right = [0, 0], [0, 0], 0
    precisions, pooled = [], []
    for values, mask in zip(pixels.double().clamp(min=0), masks, strict=True):
        found = values > threshold * values.mean()
        for n, (one, other) in enumerate(((found, mask), (~found, ~mask))):
            both[n] += int((one & other).sum())
            either[n] += int((one | other).sum())
        right += int((found == mask).sum())
        flat, hit = values.flatten().numpy(), mask.flatten().numpy()
        precisions.append(average_precision_score(hit, flat))
        unit = (values - values.min()) / (values.max() - values.min())
        score, truth = torch.stack([1 - unit, unit]), torch.stack([~mask, mask])
        pooled.append(average_precision_score(truth.flatten().numpy(), score.flatten().numpy()))
    return {
        "pixel_accuracy": right / masks.numel(),
        "miou": (both[0] / either[0] + both[1] / either[1]) / 2,
        "foreground_iou": both[0] / either[0],
        "mean_average_precision": sum(precisions) / len(precisions),
        "two_class_average_precision": sum(pooled) / len(pooled),
    }


@pytest.mark.parametrize("threshold", [1.0, 0.5, 2.0])
def test_measures_are_those_of_published_code(threshold):
    maps, masks = some_maps(5, 1), some_masks(5)
    found = heatmap.segment(maps, masks, threshold=threshold)
    assert found.numbers() == pytest.approx(by_hand(maps.to_pixels()[:, 0], masks, threshold))
    assert found.numbers() == {name: getattr(found, name) for name in found.numbers()}
    pieces = [heatmap.segment(maps.images(n), masks[n : n + 1], threshold=threshold) for n in range(5)]
    joined = heatmap.Segmentation.cat(pieces)
    assert joined.numbers() == pytest.approx(found.numbers())
    assert joined.threshold == threshold
    other = heatmap.segment(maps, masks, threshold=0.125)
    assert heatmap.Segmentation.cat([*pieces, other]).threshold is None
    for measure in found.numbers():
        low, high = found.interval(measure)
        assert low <= found.numbers()[measure] <= high


def test_average_precision_counts_equal_scores_together():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 0.0]])
    right = torch.tensor([[True, False, False, False], [False, True, False, True]])
    expected = [average_precision_score(r.numpy(), s.numpy()) for s, r in zip(scores, right, strict=True)]
    assert heatmap.average_precision(scores, right).tolist() == pytest.approx(expected)
    assert expected[0] == 0.25


def test_constant_foreground_is_foreground_everywhere():
    model, images = tiny()
    masks = some_masks(2, 32, 32)
    found = heatmap.segment(heatmap.constant(model, images), masks)
    assert found.foreground_iou == pytest.approx(float(masks.double().mean()))
    assert found.pixel_accuracy == pytest.approx(float(masks.double().mean()))
    assert found.miou == pytest.approx(found.foreground_iou / 2)
    assert found.mean_average_precision == pytest.approx(float(masks.double().mean()))


def test_without_clipping_negative_maps_have_a_foreground_too():
    masks = over_pixels(torch.eye(3).bool()[None])
    maps = Heatmaps(torch.eye(3)[None, None] - 5, (OWN,), TokenGrid(3, 3, (24, 24)), "by hand")
    assert heatmap.segment(maps, masks, resize="nearest").foreground_iou == 0
    assert heatmap.segment(maps, masks, resize="nearest", clip=False).miou == 1


def test_the_threshold_is_chosen_by_what_it_does_to_the_measure():
    values = torch.full((1, 1, 4, 4), 1.0)
    values[0, 0, 0] = 1.5
    maps = Heatmaps(values, (OWN,), TokenGrid(4, 4, (32, 32)), "by hand")
    masks = over_pixels(torch.ones(1, 4, 4).bool())
    chosen = heatmap.choose_threshold(maps, masks, resize="nearest")
    tried = {t: heatmap.segment(maps, masks, threshold=t, resize="nearest").miou for t in (0.25, 0.5, 0.75, 1.0, 1.25)}
    assert tried[0.75] == 1 > tried[1.0]
    assert chosen == 0.75
    top = masks.clone()
    top[:, PATCH:] = False
    assert heatmap.choose_threshold(maps, top, resize="nearest") == 1.0


def test_maps_point_at_the_right_one_of_two_objects():
    maps = some_maps(2, 1)
    pixels = maps.to_pixels(resize="nearest")[:, 0]
    first = pixels == pixels.amax((1, 2), keepdim=True)
    others = pixels == pixels.amin((1, 2), keepdim=True)
    assert heatmap.hits(maps, first, resize="nearest").tolist() == [True, True]
    assert heatmap.hits(maps, others, resize="nearest").tolist() == [False, False]
    assert heatmap.prefers(maps, first, others, resize="nearest").tolist() == [True, True]
    assert heatmap.prefers(maps, others, first, resize="nearest").tolist() == [False, False]


def test_the_testbeds_clip_points_at_the_object_that_a_text_is_of():
    scenes = testbed.Scenes("pairs", seed=3, size=40).scenes(range(40))
    images = testbed.normalised(torch.stack([scene.image for scene in scenes]))
    colours = testbed.scenes.ATTRIBUTES["colour"]
    bank = banks.text_bank(testbed.load_original("clip"), banks.features()["colour"], templates=banks.TEMPLATES)
    maps = heatmap.of_texts(testbed.load("clip"), images, bank, against=bank)
    wanted = [bank.texts[colours.index(scene.attributes["colour"])] for scene in scenes]
    first, second = (torch.stack([scene.masks[name] for scene in scenes]) for name in ("object", "second"))
    assert float(heatmap.prefers(maps.picked(wanted), first, second).double().mean()) > 0.75


# ---- baselines


def patterns_of(model, images):
    names = [f"blocks.{n}.attn.hook_pattern" for n in range(2)]
    _, cache = model.run_with_cache(images, names_filter=names)
    return [cache[name] for name in names]


READ = {"class_token": (1, [0]), "mean_pool_fc_norm": (0, range(16)), "dinov2_reg": (3, [0]), "distilled": (2, [0, 1])}


@pytest.mark.parametrize("name", READ)
def test_raw_attention_and_rollout_are_products_of_patterns(name):
    model, images = tiny(name)
    prefix, read = READ[name]
    patterns = [one.mean(1) for one in patterns_of(model, images)]
    raw = patterns[-1][:, list(read)].mean(1)[:, prefix:].reshape(2, 1, 4, 4)
    torch.testing.assert_close(heatmap.raw_attention(model, images).values, raw)
    mixed = [(one + torch.eye(one.shape[1])) / 2 for one in patterns]
    rolled = (mixed[1] @ mixed[0])[:, list(read)].mean(1)[:, prefix:].reshape(2, 1, 4, 4)
    torch.testing.assert_close(heatmap.rollout(model, images).values, rolled)
    first = patterns[0][:, list(read)].mean(1)[:, prefix:].reshape(2, 1, 4, 4)
    torch.testing.assert_close(heatmap.raw_attention(model, images, layer=0).values, first)
    assert heatmap.rollout(model, images).texts == (ANY,)


@pytest.mark.parametrize("name", ["class_token", "mean_pool_fc_norm"])
def test_chefers_relevance_is_that_of_derivatives_by_differences(name):
    """Gradients of patterns by central differences of runs with another pattern: no autograd."""
    model, images = tiny(name, 1)
    direction = torch.eye(10, dtype=torch.float64)[4:5]
    prefix, read = READ[name]
    relevance = torch.eye(16 + prefix, dtype=torch.float64)
    step = 1e-5
    for layer, pattern in enumerate(patterns_of(model, images)):
        nudges = step * torch.eye(pattern[0].numel(), dtype=torch.float64).unflatten(1, pattern.shape[1:])
        many = images.expand(len(nudges), -1, -1, -1)
        ends = []
        for sign in (1, -1):
            hook = (f"blocks.{layer}.attn.hook_pattern", lambda value, hook, by=sign * nudges: value + by)
            with torch.no_grad(), model.hooks(fwd_hooks=[hook]):
                ends.append(model(many) @ direction[0])
        slopes = ((ends[0] - ends[1]) / (2 * step)).reshape(pattern.shape)
        relevance = relevance + (pattern * slopes).clamp(min=0).mean(1)[0] @ relevance
    expected = relevance[list(read)].mean(0)[prefix:].reshape(1, 1, 4, 4)
    found = heatmap.chefer(model, images, direction).values
    scale = float(expected.max() - expected.min())
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("name", ["class_token", "mean_pool_fc_norm", "distilled"])
def test_grad_cam_of_attention_is_that_of_derivatives_by_differences(name):
    model, images = tiny(name, 1)
    direction = torch.eye(10, dtype=torch.float64)[4:5]
    prefix, read = READ[name]
    pattern = patterns_of(model, images)[1]
    step = 1e-5
    weights = []
    for head in range(pattern.shape[1]):
        ends = []
        for sign in (1, -1):
            nudge = torch.zeros_like(pattern)
            nudge[0, head, list(read), prefix:] = sign * step  # the same for all patches: their mean slope
            hook = ("blocks.1.attn.hook_pattern", lambda value, hook, by=nudge: value + by)
            with torch.no_grad(), model.hooks(fwd_hooks=[hook]):
                ends.append((model(images) @ direction[0]).item())
        weights.append((ends[0] - ends[1]) / (2 * step) / (pattern.shape[3] - prefix))
    rows = pattern[0, :, list(read)].mean(1)[:, prefix:]
    weighted = (torch.tensor(weights, dtype=torch.float64)[:, None] * rows).sum(0).reshape(1, 1, 4, 4)
    assert float(weighted.abs().max()) > 0
    for sign in (1, -1):  # of one or the other, something is left after clipping
        found = heatmap.attention_cam(model, images, sign * direction).values
        torch.testing.assert_close(found, (sign * weighted).clamp(min=0), atol=1e-9, rtol=1e-5)


def test_an_attention_pool_is_a_last_layer():
    model, images = tiny("siglip")
    names = [*(f"blocks.{n}.attn.hook_pattern" for n in range(2)), "attn_pool.hook_pattern"]
    _, cache = model.run_with_cache(images, names_filter=names)
    pool = cache[names[2]].mean(1)
    torch.testing.assert_close(heatmap.raw_attention(model, images).values, pool.reshape(2, 1, 4, 4))
    mixed = [(cache[name].mean(1) + torch.eye(16)) / 2 for name in names[:2]]
    torch.testing.assert_close(heatmap.rollout(model, images).values, (pool @ mixed[1] @ mixed[0]).reshape(2, 1, 4, 4))
    for make in (heatmap.chefer, heatmap.attention_cam):
        assert float(make(model, images, torch.eye(10)).values.abs().max()) > 0


def test_one_map_an_image_is_that_of_its_own_direction():
    model, images = tiny()
    rows = torch.eye(10)
    for make in (heatmap.chefer, heatmap.grad_cam, heatmap.attention_cam):
        every, own = make(model, images, rows), make(model, images, rows, own=[4, 9])
        torch.testing.assert_close(own.values[:, 0], every.values[[0, 1], [4, 9]])
        assert own.texts == (OWN,)
        names = tuple(map(str, range(10)))
        named = make(model, images, rows, names=names).picked(["4", "9"])
        torch.testing.assert_close(named.values, own.values)


@pytest.mark.parametrize("name", ["class_token", "mean_pool_fc_norm"])
def test_the_representation_is_explained_as_logits_are(name):
    model, images = tiny(name)
    rows = torch.eye(10, dtype=torch.float64)[:3]
    for make in (heatmap.chefer, heatmap.grad_cam, heatmap.attention_cam):
        logits = make(model, images, rows)
        torch.testing.assert_close(make(model, images, rows @ model.W_U.T, of="representation").values, logits.values)


def by_library(original, layer, images, target, reshape):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    for parameter in original.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cam = GradCAM(model=original, target_layers=[layer], reshape_transform=reshape)
        return torch.from_numpy(cam(input_tensor=images, targets=[ClassifierOutputTarget(target)] * len(images)))


def as_the_library_scales(pixels):
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    return (pixels - low) / (high - low)


def columns(values, prefix):
    return values[:, prefix:].transpose(1, 2).reshape(len(values), -1, 4, 4)


@pytest.mark.skipif(importlib.util.find_spec("pytorch_grad_cam") is None, reason="needs grad-cam")
@pytest.mark.parametrize("name", ["class_token", "mean_pool_fc_norm", "dinov2_reg"])
def test_grad_cam_is_that_of_the_library_for_columns(name):
    original = TINY_MODELS[name]()
    images = images_for(name, 2)
    prefix = READ[name][0]
    found = heatmap.grad_cam(HookedViT(original), images, torch.eye(10))
    assert float(found.values.amax((2, 3))[:, 4].min()) > 0
    layer = original.blocks[
        -1 if name == "mean_pool_fc_norm" else -2
    ]  # after the last block a class token stands alone
    expected = by_library(original, layer, images, 4, lambda values: columns(values, prefix))
    torch.testing.assert_close(as_the_library_scales(found.to_pixels()[:, 4]), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("pytorch_grad_cam") is None, reason="needs grad-cam")
def test_grad_cam_is_that_of_the_library_for_stages():
    original = testbed.load_original("swin")
    images = testbed.normalised(testbed.Scenes("test").images(range(2)))
    model = testbed.load("swin")
    found = heatmap.grad_cam(model, images, torch.eye(model.original.num_classes))
    layer = original.layers[-1].blocks[-1]
    expected = by_library(original, layer, images, 2, lambda values: values.permute(0, 3, 1, 2))
    torch.testing.assert_close(as_the_library_scales(found.to_pixels()[:, 2]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["swin", "maxvit"])
def test_models_without_global_attention_have_grad_cam_only(name):
    model = testbed.load(name)
    images = testbed.normalised(testbed.Scenes("test").images(range(2)))
    rows = torch.eye(model.original.num_classes)[:2]
    for make in (
        heatmap.raw_attention,
        heatmap.rollout,
        lambda *of: heatmap.chefer(*of, rows),
        lambda *of: heatmap.attention_cam(*of, rows),
    ):
        with pytest.raises(UnsupportedModelError, match=r"GradCAM works for any model"):
            make(model, images)
    found = heatmap.grad_cam(model, images, rows)
    assert found.to_pixels().shape == (2, 2, 48, 48)
    assert float(found.values.max()) > 0


@pytest.mark.parametrize("name", ["cait", "xcit", "parallel_things"])
def test_other_kinds_of_attention_are_refused_too(name):
    name = next(known for known in TINY_MODELS if known.startswith(name))
    with pytest.raises(UnsupportedModelError, match="one attention from all tokens to all tokens"):
        heatmap.rollout(HookedViT(TINY_MODELS[name]()), images_for(name, 1))


def test_all_methods_go_into_one_measure():
    model = testbed.load("deit")
    scenes = testbed.Scenes("test", seed=1, size=8).scenes(range(8))
    images = testbed.normalised(torch.stack([scene.image for scene in scenes]))
    masks = torch.stack([scene.masks["object"] for scene in scenes])
    shapes = testbed.scenes.ATTRIBUTES["shape"]
    wanted = [scene.attributes["shape"] for scene in scenes]
    rows, own = torch.eye(model.original.num_classes), [shapes.index(one) for one in wanted]
    made = [
        heatmap.of_classes(model, images, list(shapes), relative=True).picked(wanted),
        heatmap.raw_attention(model, images).picked(wanted),
        heatmap.rollout(model, images),
        heatmap.chefer(model, images, rows, own=own),
        heatmap.grad_cam(model, images, rows, own=own),
        heatmap.constant(model, images),
    ]
    found = {one.method: heatmap.segment(one, masks) for one in made}
    assert len(found) == 6
    assert found["decomposition"].miou > found["constant"].miou


def test_baselines_leave_nothing_behind():
    model, images = tiny()
    before = model(images)
    for make in (heatmap.chefer, heatmap.grad_cam, heatmap.attention_cam):
        maps = make(model, images, torch.eye(10))
        assert not maps.values.requires_grad
    assert not heatmap.rollout(model, images).values.requires_grad
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert all(p.grad is None for p in model.original.parameters())
    assert torch.equal(model(images), before)


# ---- pictures


def test_overlays_are_drawn(tmp_path):
    maps = some_maps(2, 3)
    photographs = [Image.new("RGB", (90, 60), colour) for colour in ("white", "grey")]
    heatmap.save_overlays(maps, photographs, tmp_path / "a.png")
    plain = matplotlib.image.imread(tmp_path / "a.png")
    heatmap.save_overlays(maps, photographs, tmp_path / "b.png", seen=[(10.0, 10.0, 58.0, 42.0)] * 2)
    assert not (matplotlib.image.imread(tmp_path / "b.png") == plain).all()
    empty = replace(maps, values=torch.zeros_like(maps.values))
    heatmap.save_overlays(empty, photographs, tmp_path / "c.png")
    red = lambda picture: float((picture[..., 0] - picture[..., 2]).max())  # noqa: E731
    assert red(plain) > 0.3 > red(matplotlib.image.imread(tmp_path / "c.png"))


# ---- what cannot be


def segmenting(masks, maps=None):
    return heatmap.segment(some_maps(3, 1) if maps is None else maps, masks)


def texts_of(*, null=None, **options):
    model, images = tiny()
    return heatmap.of_texts(model, images, TextBank(["a"], torch.ones(1, 32), space="drawn"), null=null, **options)


CASES = {
    "masks of another size": (
        lambda: segmenting(some_masks(3, 24, 24)),
        InputError,
        r"(3, 32, 48), that of the images",
    ),
    "masks of other images": (lambda: segmenting(some_masks(2)), InputError, "(2, 32, 48)"),
    "masks of numbers": (lambda: segmenting(some_masks().float()), InputError, "got torch.float32"),
    "masks that show nothing": (lambda: segmenting(some_masks() & False), InputError, "3 are empty"),
    "several maps": (lambda: segmenting(some_masks(), some_maps()), InputError, "maps.picked(texts)"),
    "an unknown text": (lambda: some_maps()["text 9"], UnknownNameError, "no heatmap of 'text 9'"),
    "too few texts": (lambda: some_maps().picked(["text 0"]), InputError, "a text for each of the 3 images"),
    "no others": (lambda: some_maps(texts=1).relative(), InputError, "maps of other texts"),
    "another resize": (lambda: some_maps().to_pixels(resize="cubic"), InputError, "resize="),
    "no pixels": (lambda: some_maps().to_pixels(0, 4), InputError, "at least one pixel"),
    "another measure": (
        lambda: heatmap.choose_threshold(some_maps(3, 1), some_masks(), measure="mean_average_precision"),
        InputError,
        "measure= one of",
    ),
    **{
        f"a threshold of {number}": (
            lambda number=number: heatmap.choose_threshold(some_maps(3, 1), some_masks(), thresholds=[1.0, number]),
            InputError,
            f"a number of at least 0, or 'otsu'; got {number!r}",
        )
        for number in (float("nan"), float("inf"), -1.0, "mean")
    },
    "constants only": (
        lambda: heatmap.from_tokens(token_sample(), components="head.bias"),
        InputError,
        "none of ['head.bias'] does",
    ),
    "an unknown component": (
        lambda: heatmap.from_tokens(token_sample(), components=["L9H9"]),
        UnknownNameError,
        "no component 'L9H9'",
    ),
    "no components": (lambda: heatmap.from_tokens(token_sample(), components=[]), InputError, "at least one label"),
    "a small null": (
        lambda: texts_of(null=TextBank(["b", "c"], torch.randn(2, 32), space="drawn")),
        InputError,
        "at least 19 random texts",
    ),
    "a null of another space": (
        lambda: texts_of(null=TextBank(["b"], torch.randn(1, 32), space="other")),
        InputError,
        "the space of this bank",
    ),
    "no other texts": (
        lambda: texts_of(against=TextBank(["a"], torch.ones(1, 32), space="drawn")),
        InputError,
        "to hold 'a' against",
    ),
    "no batches": (lambda: texts_of(batch_size=0), InputError, "batch_size="),
    "an unknown class": (lambda: heatmap.of_classes(*tiny(), [99]), UnknownNameError, "99"),
    "a class twice": (lambda: heatmap.of_classes(*tiny(), [1, 1]), InputError, "different classes"),
    "no classes": (lambda: heatmap.of_classes(*tiny(), []), InputError, "at least one number or name"),
    "no classifier": (lambda: heatmap.of_classes(*tiny("no_classifier"), [1]), UnsupportedModelError, "classifier"),
    "directions of another width": (
        lambda: heatmap.chefer(*tiny(), torch.eye(3)),
        InputError,
        "rows of 10 for of='logits'",
    ),
    "another read-out": (lambda: heatmap.grad_cam(*tiny(), torch.eye(10), of="head"), InputError, "of='head'"),
    "no such layer": (lambda: heatmap.raw_attention(*tiny(), layer=2), InputError, "a layer from -2 to 1"),
    "a hook without patches": (
        lambda: heatmap.grad_cam(*tiny(), torch.eye(10), at="blocks.1.attn.hook_pattern"),
        InputError,
        "a token for each patch",
    ),
    "own directions that there are not": (
        lambda: heatmap.chefer(*tiny(), torch.eye(10), own=[0, 10]),
        InputError,
        "a number from 0 to 9",
    ),
}


@pytest.mark.parametrize("case", CASES)
@as_users_run_it()
def test_what_cannot_be_is_refused(case):
    call, error, message = CASES[case]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
