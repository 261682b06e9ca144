"""Repair where the truth is planted, and weights that are exported against runs that are ablated."""

import copy
from functools import cache, partial

import pytest
import staged_models
import timm
import torch
from tiny_models import TINY_MODELS, images_for
from torch import nn

from vitdecomp_lens import HookedViT, testbed
from vitdecomp_lens.applications import repair
from vitdecomp_lens.applications.repair import GroupAccuracy, Groups, Ranking, exporting
from vitdecomp_lens.clip import TextBank
from vitdecomp_lens.errors import GapError, InputError, UnknownNameError, UnsupportedModelError
from vitdecomp_lens.interpret.features import score_features
from vitdecomp_lens.intervene import Reference, ablate_run
from vitdecomp_lens.linear_classifier import LinearClassifier
from vitdecomp_lens.testbed.planted import planted_groups

WITHIN = 0.02  # of what a classifier without the spurious components has
SLACK = 0.02  # about the standard error of a group of 500
DECAY = 0.1  # of classifiers: so strong that they go by what is easily seen


# ---- groups


def test_accuracy_by_group_by_hand():
    labels, water = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 1, 1])
    groups = Groups.crossing(label=labels, water=water)
    assert groups.names == ("label 0, water 0", "label 0, water 1", "label 1, water 0", "label 1, water 1")
    found = GroupAccuracy.of(torch.tensor([0, 1, 0, 1, 0, 0]), labels, groups)
    assert found.accuracies == (0.5, 1.0, 1.0, 0.0)
    assert found.images == (2, 1, 1, 2)
    assert (found.worst, found.worst_group, found.average) == (0.0, "label 1, water 1", 0.625)
    assert found["label 0, water 0"] == 0.5
    scores = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 1, 0, 0])).double()
    assert GroupAccuracy.of(scores, labels, groups) == found
    assert GroupAccuracy.of(scores, labels).accuracies == (0.5,)


def test_a_group_without_samples_is_named():
    labels, water = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    with pytest.raises(InputError, match="'label 0, water 1'"):
        GroupAccuracy.of(labels, labels, Groups.crossing(label=labels, water=water))
    with pytest.raises(InputError, match="'sea', 'sky'"):
        GroupAccuracy.of(labels, labels, Groups(torch.zeros(3, dtype=torch.int64), ("land", "sea", "sky")))


def test_groups_that_do_not_fit_are_refused():
    labels = torch.tensor([0, 1, 1])
    for wrong in (torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0])):
        with pytest.raises(InputError, match="numbers of groups"):
            Groups(wrong, ("a", "b"))
    with pytest.raises(InputError, match="a name of its own"):
        Groups(labels, ("a", "a"))
    with pytest.raises(InputError, match="for the same images"):
        Groups.crossing(label=labels, water=labels[:2])
    with pytest.raises(InputError, match="a label and a group for each"):
        GroupAccuracy.of(labels, labels, Groups.one(2))


# ---- rankings, where the truth is planted


@cache
def planted(draw=0, agrees=0.9, seed=0, images=2000):
    return planted_groups(images=images, agrees=agrees, draw=draw, seed=seed, dtype=torch.float64)


def ranked(truth):
    texts = TextBank(["round", "water"], truth.directions, space="planted")
    features = {"core": texts.select("round"), "spurious": texts.select("water")}
    return repair.rank(score_features(truth.parts, features, bootstrap=0, permutations=0), "spurious", "core")


def groups_of(truth):
    return Groups.crossing(label=truth.label, water=truth.spurious)


@pytest.mark.parametrize("seed", range(3))
def test_planted_carriers_are_found_and_the_worst_group_is_restored(seed):
    training, validation, test = planted(seed=seed), planted(1, 0.5, seed), planted(2, 0.5, seed)
    classifier = LinearClassifier.fit(training.parts.total, training.label, decay=DECAY)
    ranking = ranked(training)
    assert set(ranking.components[:3]) == set(training.carriers)  # precision 1
    options = {"classifier": classifier, "reference": training.parts}
    groups = groups_of(validation)
    choice = repair.choose_direct(validation.parts, ranking, validation.label, groups=groups, slack=SLACK, **options)
    assert set(choice.components) == set(training.carriers)
    found = repair.measure_direct(test.parts, choice.components, test.label, groups=groups_of(test), **options)
    core = [label for label in training.parts.labels if label not in training.carriers]
    without = LinearClassifier.fit(training.parts.select(labels=core).values.sum(0), training.label, decay=DECAY)
    scores = without(test.parts.select(labels=core).values.sum(0))
    bound = GroupAccuracy.of(scores, test.label, groups_of(test))
    assert found.before.worst < bound.worst - 0.1
    assert found.after.worst > bound.worst - WITHIN
    assert found.after.average > found.before.average
    for other in (ranking.reversed(), ranking.shuffled(seed)):
        chosen = other.components[: choice.count]
        if set(chosen) & set(training.carriers):
            continue
        worse = repair.measure_direct(test.parts, chosen, test.label, groups=groups_of(test), **options)
        assert worse.after.worst < found.after.worst - 0.1


def test_how_many_is_chosen_by_the_worst_group_and_of_equals_the_fewest():
    truth = planted()
    ranking = [*truth.carriers, *truth.core]
    classifier = LinearClassifier.fit(truth.parts.total, truth.label)
    fair = planted(1, 0.5)
    options = {"groups": groups_of(fair), "classifier": classifier, "reference": truth.parts}
    choice = repair.choose_direct(fair.parts, ranking, fair.label, **options)
    worst = [step.worst for step in choice.steps]
    assert len(worst) == 7
    assert choice.count == worst.index(max(worst)) == 3
    average = repair.choose_direct(fair.parts, ranking, fair.label, criterion="average", **options)
    assert average.after.average == max(step.average for step in choice.steps)
    for count, step in enumerate(choice.steps):
        ablated = fair.parts if not count else fair.parts.ablate(ranking[:count], how="mean", reference=truth.parts)
        assert step == GroupAccuracy.of(classifier(ablated.values.sum(0)), fair.label, groups_of(fair))
    none = repair.choose_direct(fair.parts, truth.core, fair.label, **options)
    assert none.components == ()
    assert none.after == none.before


def test_equally_good_numbers_give_the_fewest():
    truth = planted(images=40)
    silent = [label for label in truth.parts.labels if label not in (*truth.core, *truth.carriers)]
    classifier = torch.stack([-truth.directions[0], truth.directions[0]]) * 0  # nothing matters
    choice = repair.choose_direct(truth.parts, silent, truth.label, classifier=classifier, how="zero")
    assert choice.count == 0


def test_with_slack_the_first_that_is_nearly_as_good_is_taken():
    truth, fair = planted(), planted(1, 0.5)
    classifier = LinearClassifier.fit(truth.parts.total, truth.label, decay=DECAY)
    options = {"groups": groups_of(fair), "classifier": classifier, "reference": truth.parts}
    ranking = [*truth.carriers[:2], *truth.core]
    worst = [step.worst for step in repair.choose_direct(fair.parts, ranking, fair.label, **options).steps]
    assert max(worst) == worst[2] > worst[1] > worst[0]
    for slack in (0.0, worst[2] - worst[1] + 1e-9, 1.0):
        choice = repair.choose_direct(fair.parts, ranking, fair.label, slack=slack, **options)
        assert choice.count == (2 if not slack else 0 if slack == 1 else 1)


def test_a_component_that_a_classifier_reads_is_found_though_it_writes_against_the_others():
    chance = torch.Generator().manual_seed(0)
    label, water = (2.0 * torch.randint(2, (2, 500), generator=chance) - 1).double()
    seen, core, read = torch.eye(3, 8, dtype=torch.float64)
    values = 0.01 * torch.randn(4, 500, 8, generator=chance, dtype=torch.float64)
    values[0] += 3 * water[:, None] * seen  # writes most of the background, which no border goes by
    values[1] += water[:, None] * (2 * read - seen)
    values[2] += label[:, None] * core
    parts = type(planted().parts)(values, ("L0H0", "L0H1", "L0H2", "L0H3"), values.sum(0))
    texts = TextBank(["round", "water"], torch.stack([core, seen]), space="planted")
    background, shape = texts.select("water"), texts.select("round")
    classifier = torch.stack([-core - read, core + read])
    ranking = repair.rank_read(parts, parts, classifier, background, shape)
    assert (ranking.components[0], ranking.components[-1]) == ("L0H1", "L0H2")
    assert ranking.margins[0] == pytest.approx(1, abs=0.01)
    assert ranking.margins[-1] == pytest.approx(-1, abs=0.01)
    scores = score_features(parts, {"wrong": background, "right": shape}, bootstrap=0, permutations=0)
    for by in ("correlation", "covariance"):
        assert repair.rank(scores, "wrong", "right", by=by).components[0] == "L0H0"
    linear = LinearClassifier(classifier, torch.tensor([5.0, -5.0], dtype=torch.float64))
    assert repair.rank_read(parts, parts, linear, background, shape).margins == pytest.approx(ranking.margins)
    with pytest.raises(InputError, match="next to nothing"):
        repair.rank_read(parts, parts, torch.stack([-core, core]), background, shape)
    for one, other in ((background, background), (texts, shape), (background, texts)):
        with pytest.raises(InputError, match="spanned by those of the other"):
            repair.rank_read(parts, parts, classifier, one, other)
    with pytest.raises(InputError, match="of kind 'mlp'"):
        repair.rank_read(parts, parts, classifier, background, shape, kind="mlp")


def test_what_does_not_help_is_skipped():
    truth, fair = planted(), planted(1, 0.5)
    classifier = LinearClassifier.fit(truth.parts.total, truth.label, decay=DECAY)
    options = {"groups": groups_of(fair), "classifier": classifier, "reference": truth.parts}
    mixed = [label for pair in zip(truth.core, truth.carriers, strict=True) for label in pair]
    choice = repair.choose_direct(fair.parts, mixed, fair.label, skipping=True, slack=SLACK, **options)
    assert choice.candidates == choice.components == truth.carriers
    assert repair.measure_direct(fair.parts, truth.carriers, fair.label, **options).after == choice.after
    assert [step.worst for step in choice.steps] == sorted(step.worst for step in choice.steps)
    none = repair.choose_direct(fair.parts, truth.core, fair.label, skipping=True, slack=SLACK, **options)
    assert (none.components, none.after) == ((), none.before)


def test_what_is_to_be_spared_is_spared():
    truth, fair = planted(), planted(1, 0.5)
    classifier = LinearClassifier.fit(truth.parts.total, truth.label, decay=DECAY)
    groups = groups_of(fair)
    options = {"groups": groups, "classifier": classifier, "reference": truth.parts}
    free = repair.choose_direct(fair.parts, truth.carriers, fair.label, **options)
    losers = {name: free.before[name] - free.after[name] for name in groups.names}
    name = max(losers, key=losers.get)
    assert losers[name] > 0.005  # a group that gained by what misleads the others
    for skipping in (False, True):
        choose = partial(repair.choose_direct, fair.parts, truth.carriers, fair.label, skipping=skipping, **options)
        assert choose(sparing={name: losers[name] + 1e-9}).components == truth.carriers
        spared = choose(sparing={name: losers[name] / 2})
        assert spared.after[name] >= spared.before[name] - losers[name] / 2
        assert spared.count < free.count
        assert choose(sparing={"average": 0.0}).components == truth.carriers
        with pytest.raises(UnknownNameError, match="'sea' to spare"):
            choose(sparing={"sea": 0.0})


def test_images_that_are_gone_cannot_be_gone_through_again():
    model, images = HookedViT(planted_model()), stripes(4, 0.5, 0)[0]
    labels = torch.tensor([0, 1, 0, 1])
    options = {"how": "zero", "of": "representation", "skipping": True}
    with pytest.raises(InputError, match="many times"):
        repair.choose_total(model, iter(images.split(2)), ["L0H1"], labels, **options)
    with pytest.raises(InputError, match="reference= are gone through many times"):
        repair.choose_total(
            model, images, ["L0H1"], labels, **{**options, "how": "mean"}, reference=iter((images + 1).split(2))
        )
    whole, split = (
        repair.choose_total(model, given, ["L0H1"], labels, **options) for given in (images, images.split(2))
    )
    assert whole.steps == split.steps


def test_rankings_the_other_way_round_and_by_chance():
    ranking = ranked(planted())
    assert list(ranking.margins) == sorted(ranking.margins, reverse=True)
    assert ranking.reversed().components == ranking.components[::-1]
    shuffled = ranking.shuffled(1)
    assert shuffled.components != ranking.components
    assert dict(zip(shuffled.components, shuffled.margins, strict=True)) == dict(
        zip(ranking.components, ranking.margins, strict=True)
    )
    assert shuffled == ranking.shuffled(1) != ranking.shuffled(2)
    assert repr(ranking).startswith("Ranking(12 components by spurious minus core, correlation: ")


def test_a_ranking_is_the_difference_of_two_scores_and_has_no_constants():
    truth = planted()
    parts = truth.parts
    values = torch.cat([parts.values, torch.ones_like(parts.values[:1])])
    with_bias = type(parts)(values, (*parts.components, "norm.bias"), values.sum(0))
    texts = TextBank(["round", "water"], truth.directions, space="planted")
    features = {"core": texts.select("round"), "spurious": texts.select("water")}
    scores = score_features(with_bias, features, bootstrap=0, permutations=0)
    for by in ("correlation", "covariance"):
        ranking = repair.rank(scores, "spurious", "core", by=by)
        assert set(ranking.components) == set(parts.labels)
        for label, margin in zip(ranking.components, ranking.margins, strict=True):
            expected = scores.score(label, "spurious", by=by).value - scores.score(label, "core", by=by).value
            assert margin == pytest.approx(expected)
    with pytest.raises(InputError, match="of kind 'mlp'"):
        repair.rank(scores, "spurious", "core", kind="mlp")


def test_typographic_repair_is_the_same_with_plain_accuracy():
    """Components that write a written word are taken away; accuracy where words mislead is what it is without words."""
    training, misled, clean = planted(), planted(3, 0.0), planted(4, 0.5)
    classifier = LinearClassifier.fit(training.parts.total, training.label, decay=DECAY)
    options = {"classifier": classifier, "reference": training.parts}
    choice = repair.choose_direct(misled.parts, ranked(training), misled.label, slack=SLACK, **options)
    assert set(choice.components) == set(training.carriers)
    assert choice.before.accuracies[0] < 0.7
    assert choice.after.accuracies[0] > 0.95
    both = repair.measure_direct(clean.parts, choice.components, clean.label, **options)
    assert both.after.average > both.before.average - 0.01


# ---- the same in runs


def planted_model(heads=4, width=16):
    """A tiny ViT whose class token gets everything from heads: head 0 writes channel 0, head 1 channel 1."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": heads, "num_classes": 2},
    )
    model = model.double().eval().requires_grad_(False)
    chance = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.weight.fill_(1)
    for channel in range(2):
        model.patch_embed.proj.weight[channel, channel] = 1 / 16
        model.patch_embed.proj.weight[channel + 2, channel] = -1 / 16  # so that means are zero, and norms know less
    # So large beside what images write that norms hardly react, and what was read before can be read after.
    model.pos_embed[:] = 12 * torch.randn(model.pos_embed.shape, generator=chance, dtype=torch.float64)
    first, d_head = model.blocks[0].attn, width // heads
    values = first.qkv.weight[2 * width :]
    for head, strength in ((0, 1.0), (1, 3.0)):
        values[head * d_head, head] = strength
        first.proj.weight[8 + head, head * d_head] = 1
    values[2 * d_head, 4] = 1
    first.proj.weight[12, 2 * d_head] = 1
    return model


def stripes(count, agrees, seed):
    chance = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (count,), generator=chance)
    agree = torch.rand(count, generator=chance) < agrees
    water = torch.where(agree, label, 1 - label)
    images = 0.5 * torch.randn(count, 3, 16, 16, generator=chance, dtype=torch.float64)
    shift = 0.6 * torch.randn(count, 2, generator=chance, dtype=torch.float64)
    images[:, 0] += (2 * label - 1 + shift[:, 0])[:, None, None]
    images[:, 1] += (2 * water - 1 + shift[:, 1])[:, None, None]
    return images, label, water


def test_planted_heads_are_found_in_runs_and_the_exported_model_is_repaired_too():
    original = planted_model()
    model = HookedViT(original)
    training, label, _ = stripes(600, 0.97, 0)
    represent = partial(original.forward_head, pre_logits=True)  # it has no weights
    classifier = LinearClassifier.fit(represent(original.forward_features(training)), label, decay=DECAY)
    validation, fair, water = stripes(400, 0.5, 1)
    groups = Groups.crossing(label=fair, water=water)
    ranking = ["L0H1", "L0H0", "L0H2", "L0H3"]
    reference = Reference.of(model, training)
    options = {"classifier": classifier, "reference": reference}
    choice = repair.choose_total(model, validation, ranking, fair, groups=groups, batch_size=100, **options)
    assert choice.components == ("L0H1",)
    test, test_label, test_water = stripes(1200, 0.5, 2)
    test_groups = Groups.crossing(label=test_label, water=test_water)
    found = repair.measure_total(model, test, choice.components, test_label, groups=test_groups, **options)
    state = repair.export(model, components=choice.components, reference=reference)
    plain = planted_model()
    plain.load_state_dict(state)
    refitted = LinearClassifier.fit(represent(plain.forward_features(training)), label, decay=DECAY)
    bound = GroupAccuracy.of(refitted(represent(plain.forward_features(test))), test_label, test_groups)
    assert found.effect == "total"
    assert found.before.worst < bound.worst - 0.1
    assert found.after.worst > bound.worst - WITHIN
    exported = GroupAccuracy.of(classifier(represent(plain.forward_features(test))), test_label, test_groups)
    assert exported == found.after
    reversed_order = repair.measure_total(model, test, ["L0H3"], test_label, groups=test_groups, **options)
    assert reversed_order.after.worst < found.after.worst - 0.1


def test_means_come_from_training_data_only():
    truth = planted(images=40)
    for function in (repair.choose_direct, repair.measure_direct):
        with pytest.raises(InputError, match="training data"):
            function(truth.parts, truth.carriers, truth.label, reference=truth.parts)
    model, images = HookedViT(planted_model()), stripes(4, 0.5, 0)[0]
    for reference in (images, Reference.of(model, images)):
        for function in (repair.choose_total, repair.measure_total):
            with pytest.raises(InputError, match="training data"):
                function(model, images, ["L0H1"], torch.zeros(4, dtype=torch.int64), reference=reference)


def test_options_that_do_not_fit_are_refused():
    truth = planted(images=40)
    choose = partial(repair.choose_direct, truth.parts, labels=truth.label, how="zero")
    with pytest.raises(InputError, match="most="):
        choose(truth.carriers, most=0)
    with pytest.raises(InputError, match="criterion"):
        choose(truth.carriers, criterion="best")
    with pytest.raises(InputError, match="slack"):
        choose(truth.carriers, slack=-1)
    for loss in (float("nan"), -0.1, 1.1):
        with pytest.raises(InputError, match=f"got {loss} for 'average'"):
            choose(truth.carriers, sparing={"average": loss})
    with pytest.raises(InputError, match="list of labels"):
        choose("L0H0")
    with pytest.raises(UnknownNameError, match="L9H9"):
        choose(["L9H9"])


def test_what_is_chosen_and_repaired_is_shown():
    truth, fair = planted(), planted(1, 0.5)
    classifier = LinearClassifier.fit(truth.parts.total, truth.label)
    options = {"groups": groups_of(fair), "classifier": classifier, "reference": truth.parts}
    choice = repair.choose_direct(fair.parts, Ranking(truth.carriers, (3.0, 2.0, 1.0), "hand"), fair.label, **options)
    assert repr(choice).startswith("Choice(direct, mean: 3 of 3 by hand; worst ")
    assert len(choice.table().splitlines()) == 6
    found = repair.measure_direct(fair.parts, choice.components, fair.label, **options)
    assert (found.before, found.after) == (choice.before, choice.after)
    assert repr(found).startswith("Repaired(direct, mean, 3 components: worst ")
    assert found.table().splitlines()[2].startswith("| before |")


# ---- comparisons


def test_a_balanced_probe_reads_the_label_alone():
    training, test = planted(), planted(2, 0.5)
    probe = repair.balanced_probe(training.parts.total, training.label, groups_of(training))
    plain = LinearClassifier.fit(training.parts.total, training.label)
    found, before = (
        GroupAccuracy.of(classifier(test.parts.total), test.label, groups_of(test)) for classifier in (probe, plain)
    )
    assert found.worst > before.worst + 0.05
    empty = Groups(torch.zeros(2000, dtype=torch.int64), ("land", "sea"))
    with pytest.raises(InputError, match="'sea'"):
        repair.balanced_probe(training.parts.total, training.label, empty)
    with pytest.raises(InputError, match="for each representation"):
        repair.balanced_probe(training.parts.total[:9], training.label, groups_of(training))


def test_a_balanced_probe_takes_as_many_of_each_group():
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 30 + [1] * 10)
    same = repair.balanced_probe(x, labels, Groups(labels, ("a", "b")), seed=1)
    chance = torch.Generator().manual_seed(1)
    kept = torch.cat([torch.randperm(30, generator=chance)[:10], 30 + torch.randperm(10, generator=chance)])
    by_hand = LinearClassifier.fit(x[kept], labels[kept])
    torch.testing.assert_close(same.weight, by_hand.weight, rtol=0, atol=1e-4)


def test_what_is_projected_out_is_gone_and_all_else_stays():
    training, test = planted(), planted(2, 0.5)
    basis, mean = training.directions[1:], training.parts.total.mean(0)
    projected = repair.project_out(test.parts.total, basis, mean=mean)
    torch.testing.assert_close(projected @ basis.T, (mean @ basis.T).expand(2000, 1), rtol=0, atol=1e-12)
    change = projected - test.parts.total
    torch.testing.assert_close(change @ basis.T @ basis, change, rtol=0, atol=1e-12)
    classifier = LinearClassifier.fit(training.parts.total, training.label)
    after = GroupAccuracy.of(classifier(projected), test.label, groups_of(test))
    assert after.worst > GroupAccuracy.of(classifier(test.parts.total), test.label, groups_of(test)).worst + 0.05
    with pytest.raises(InputError, match="orthonormal"):
        repair.project_out(test.parts.total, 2 * basis)
    with pytest.raises(InputError, match="as wide as"):
        repair.project_out(test.parts.total, basis[:, :5])


def test_the_span_that_predicts_coordinates_is_found():
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=chance, dtype=torch.float64)
    planted_span = torch.linalg.qr(torch.randn(6, 2, generator=chance, dtype=torch.float64)).Q
    mixing = torch.randn(2, 2, generator=chance, dtype=torch.float64)
    found = repair.span_that_predicts(x, x @ planted_span @ mixing + 3, decay=0)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found.T @ found, planted_span @ planted_span.T)
    with pytest.raises(InputError, match="vary by themselves"):
        repair.span_that_predicts(x, x[:, :1].expand(-1, 2))


# ---- export


@cache
def original(name):
    made = TINY_MODELS[name] if name in TINY_MODELS else staged_models.STAGED_MODELS[name]
    return made().double().requires_grad_(False)


def images_of(name, batch, seed):
    if name in TINY_MODELS:
        return images_for(name, batch, seed=seed).double()
    return staged_models.images_for(name, batch, seed=seed)


def run_original(model, images):
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


def setup(name):
    return HookedViT(original(name)), images_of(name, 3, 1), images_of(name, 4, 9)


def exported(name, model, state):
    """A fresh model with the exported weights."""
    fresh = copy.deepcopy(original(name))
    tower = fresh.visual if model.original is not original(name) else fresh
    for parameter in tower.parameters():
        parameter.fill_(torch.nan)  # all is loaded
    tower.load_state_dict(state, strict=True)
    return fresh


def same(one, other, atol=1e-10):
    for mine, theirs in zip(exporting._tensors(one), exporting._tensors(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol * float(theirs.abs().max()))


FOLDED = {
    "class_token": ["L0H1", "L0H3", "attn.1", "L0N5", "L0N6", "mlp.1", "embed"],
    "dinov2_reg": ["L1H0", "L0H2", "mlp.0", "attn.0"],
    "mean_pool_with_class_token": ["L1H2", "attn.0", "L1N3"],
    "layer_scale": ["L0H0", "attn.1", "mlp.0", "L1N7"],
    "post_norm": ["L0H1", "attn.1", "mlp.0"],
    "inner_norms": ["L0H1", "mlp.1", "L0N2"],
    "eva02": ["L0H1", "attn.1", "L1N4"],
    "parallel_things": ["L1H5", "attn.0", "mlp.1"],
    "open_clip": ["L0H1", "attn.1", "mlp.0", "L1N2"],
    "open_clip_custom_all": ["L0H1", "attn.1", "mlp.0"],
    "open_clip_whole": ["L1H1", "mlp.0"],
    "swin": ["L1H1", "attn.2", "mlp.0", "embed"],
    "swin_v2": ["L1H1", "attn.2", "mlp.0"],
    "maxvit_parallel": ["attn.2", "attn.5", "mlp.2", "L8H4"],
    "maxvit": ["conv.0", "mlp.1", "attn.2"],
}


@pytest.mark.parametrize("name", FOLDED)
def test_exported_weights_are_the_ablated_run(name):
    model, images, training = setup(name)
    reference = Reference.of(model, training)
    known = {
        c.label for by in ("layer", "head", "neuron") for p in model.component_points(by) for c in p.components(64)
    }
    components = [label for label in FOLDED[name] if label in known]
    assert len(components) > 1
    for how in ("mean", "zero"):
        state = repair.export(model, components=components, how=how, reference=reference)
        target = model.original.state_dict()
        assert list(state) == list(target)
        assert all(state[key].shape == target[key].shape for key in target)
        ablated = ablate_run(model, images, components=components, how=how, reference=reference)
        same(run_original(exported(name, model, state), images), ablated)
    assert not torch.allclose(exporting._tensors(ablated)[0], exporting._tensors(model(images))[0])


def test_the_original_stays_as_it_is():
    model, _, training = setup("layer_scale")
    before = {key: value.clone() for key, value in model.original.state_dict().items()}
    state = repair.export(model, components=["L0H0", "mlp.1"], reference=training)
    assert all(torch.equal(value, model.original.state_dict()[key]) for key, value in before.items())
    changed = {key for key, value in state.items() if not torch.equal(value, before[key])}
    assert changed == {
        f"blocks.{where}.{what}" for where in ("0.attn.proj", "1.mlp.fc2") for what in ("weight", "bias")
    }


def test_a_scale_of_zero_needs_no_bias():
    made = copy.deepcopy(original("layer_scale"))
    made.blocks[0].ls2.gamma[3] = 0
    model, images, training = HookedViT(made), images_of("layer_scale", 3, 1), images_of("layer_scale", 4, 9)
    state = repair.export(model, components=["mlp.0"], reference=training)
    assert state["blocks.0.mlp.fc2.bias"][3] == 0
    fresh = copy.deepcopy(made)
    fresh.load_state_dict(state)
    same(fresh(images), ablate_run(model, images, components=["mlp.0"], reference=training))


def test_a_scale_of_zero_under_another_models_mean_is_refused():
    made = copy.deepcopy(original("layer_scale"))
    reference = Reference.of(HookedViT(copy.deepcopy(made)), images_of("layer_scale", 4, 9))
    made.blocks[0].ls2.gamma[3] = 0
    with pytest.raises(UnsupportedModelError, match="scaled by zero"):
        repair.export(HookedViT(made), components=["mlp.0"], reference=reference)


def test_references_of_all_kinds_give_the_same():
    model, _, training = setup("class_token")
    options = {"components": ["L0H1", "mlp.1"]}
    expected = repair.export(model, reference=training, **options)
    several = (training.split(2), (image[None] for image in training), Reference.of(model, training))
    streamed = Reference.of(model, (image[None] for image in training))  # it has kept no images
    for reference in (*several, streamed):
        found = repair.export(model, reference=reference, **options)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_nothing_to_ablate_exports_what_is_there():
    model, _, _ = setup("class_token")
    state = repair.export(model, components=[], how="zero")
    assert all(torch.equal(value, model.original.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("name", ["deit", "clip"])
def test_trained_models_are_exported_in_single_precision(name):
    model = testbed.load(name)
    scenes = testbed.Scenes("train", seed=11, size=72)
    pictures = testbed.normalised(scenes.images(range(72)))
    training, images = pictures[:64], pictures[64:]
    components = ["L1H0", "L2H1", "mlp.2", "attn.3"]
    state = repair.export(model, components=components, reference=training)
    fresh = testbed.load_original(name)
    (fresh.visual if name == "clip" else fresh).load_state_dict(state)
    same(run_original(fresh, images), ablate_run(model, images, components=components, reference=training), atol=1e-5)


# ---- what cannot be folded


def test_what_differs_by_token_or_image_is_refused():
    model, _, training = setup("class_token")
    for how, why in (("position_mean", "shared by all tokens"), ("resample", "hold no images")):
        with pytest.raises(InputError, match=why):
            repair.export(model, components=["L0H1"], how=how, reference=training)
    with pytest.raises(InputError, match="how='mean' or how='zero'"):
        repair.export(model, components=["L0H1"], how="median", reference=training)
    with pytest.raises(InputError, match="training images"):
        repair.export(model, components=["L0H1"])


def test_unknown_components_are_refused():
    model, _, training = setup("class_token")
    for label in ("L9H0", "L0H77", "mlp.9", "L0N9999"):
        with pytest.raises(UnknownNameError, match=label):
            repair.export(model, components=[label], reference=training)
    with pytest.raises(InputError, match="constant"):
        repair.export(model, components=["norm.bias"], reference=training)
    with pytest.raises(InputError, match="a list of labels; got 'L0H1'"):
        repair.export(model, components="L0H1", reference=training)


def test_a_projection_without_bias_is_refused_by_name():
    made = copy.deepcopy(original("class_token"))
    made.blocks[0].attn.proj.bias = None
    model, images, training = HookedViT(made), images_of("class_token", 3, 1), images_of("class_token", 4, 9)
    for label in ("L0H1", "attn.0"):
        with pytest.raises(UnsupportedModelError, match=r"linear in \S+ has no bias"):
            repair.export(model, components=[label], reference=training)
        state = repair.export(model, components=[label], how="zero")
        fresh = copy.deepcopy(made)
        fresh.load_state_dict(state)
        same(fresh(images), ablate_run(model, images, components=[label], how="zero"))


def test_weights_that_blocks_share_are_refused():
    made = copy.deepcopy(original("class_token"))
    made.blocks[1].mlp.fc2.weight = made.blocks[0].mlp.fc2.weight
    model, training = HookedViT(made), images_of("class_token", 4, 9)
    for label in ("mlp.0", "L1N3"):
        with pytest.raises(UnsupportedModelError, match="share the weights"):
            repair.export(model, components=[label], reference=training)


def test_weights_that_are_computed_are_refused():
    made = copy.deepcopy(original("class_token"))
    nn.utils.parametrizations.orthogonal(made.blocks[0].mlp.fc2)
    model, training = HookedViT(made), images_of("class_token", 4, 9)
    with pytest.raises(UnsupportedModelError, match="are computed"):
        repair.export(model, components=["mlp.0"], reference=training)


def test_hooks_and_other_models_are_refused():
    model, _, training = setup("class_token")
    with (
        model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value * 2)]),
        pytest.raises(InputError, match=r"blocks\.0\.hook_mlp_out"),
    ):
        repair.export(model, components=["L0H1"], reference=training)


def test_weights_that_give_something_else_are_not_handed_out(monkeypatch):
    model, _, training = setup("class_token")
    monkeypatch.setattr(exporting.Folding, "fold_branch", lambda *args: None)
    with pytest.raises(GapError, match="something else than the ablated run"):
        repair.export(model, components=["mlp.0"], reference=training)
