"""Training the testbed's models: what they are, and that a run that was ended goes on as it would have."""

import pytest
import torch
from torch import nn

from vitdecomp_lens import HookedViT, decompose
from vitdecomp_lens.errors import InputError, UnknownNameError
from vitdecomp_lens.testbed import tasks, training
from vitdecomp_lens.testbed.models import BUILDERS, CLASSES, build, normalised
from vitdecomp_lens.testbed.scenes import ATTRIBUTES, Scenes
from vitdecomp_lens.testbed.training import Drawings, Recipe, train
from vitdecomp_lens.testbed.vocabulary import tokenize

SHORT = Recipe(6, batch=8)


def batch_of(images, *, tokens=None, masks=None):
    """A batch for a task, with random numbers of a seed."""
    count = len(images)
    return tasks.Batch(
        images,
        torch.ones(count, 48, 48, dtype=torch.bool) if masks is None else masks,
        torch.zeros(count, 6, dtype=torch.int64),
        tokenize(["a"] * count) if tokens is None else tokens,
        torch.Generator().manual_seed(0),
    )


class KilledError(Exception):
    """A run that ends in the middle."""


def test_classes_are_those_of_all_attributes_and_each_has_a_name_of_its_own():
    assert len(set(CLASSES)) == len(CLASSES) == sum(map(len, ATTRIBUTES.values()))


@pytest.mark.parametrize("name", BUILDERS)
def test_models_are_the_libraries_own_and_their_adapters_take_them(name):
    model = HookedViT(build(name).eval())
    assert type(model.original).__module__.split(".")[0] == ("open_clip" if name == "clip" else "timm")
    parts = decompose(model, normalised(Scenes("test").images(range(2))))
    assert float(parts.gap.max()) < 1e-5
    assert parts.coverage.share == 1


def test_weights_come_from_the_seed():
    one, same, other = (build("deit", seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(UnknownNameError, match="swin"):
        build("swim")


def test_clip_reads_its_texts_at_their_end():
    clip = build("clip").eval()
    short, long = tokenize(["a red star", "a red star on sand"])
    with torch.no_grad():
        before = clip.encode_text(short[None])
        changed = short.clone()
        changed[5:] = short[0]  # behind the end nothing is read
        assert torch.allclose(clip.encode_text(changed[None]), before)
        assert not torch.allclose(clip.encode_text(long[None]), before)


@pytest.mark.parametrize("name", ["clip", "deit", "dino", "maxvit"])
def test_a_run_that_was_ended_goes_on_as_it_would_have(name, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(name, tmp_path / "whole.safetensors", recipe=SHORT, scenes=32, tell=lambda _: None)
        kind = type(tasks.task_of(name, build(name)))
        losses, usual = [], kind.loss

        def ends(self, model, batch):
            if len(losses) == 4:
                raise KilledError
            losses.append(usual(self, model, batch))
            return losses[-1]

        monkeypatch.setattr(kind, "loss", ends)
        with pytest.raises(KilledError):
            train(name, tmp_path / "ended.safetensors", recipe=SHORT, scenes=32, every=0.0, tell=lambda _: None)
        monkeypatch.setattr(kind, "loss", usual)
        said = []
        again = train(name, tmp_path / "ended.safetensors", recipe=SHORT, scenes=32, tell=said.append)
    finally:
        torch.set_num_threads(threads)
    assert said[-1].startswith(f"{name}: step 6 of 6")
    for (path, expected), found in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), path


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    train("deit", tmp_path / "a.safetensors", recipe=SHORT, scenes=16, tell=lambda _: None)
    with pytest.raises(InputError, match="another training"):
        train("deit", tmp_path / "a.safetensors", recipe=SHORT, scenes=16, seed=1, tell=lambda _: None)


def test_equal_captions_are_no_negatives():
    model = build("clip")
    images = Scenes("test").images(range(4))
    tokens = tokenize(["a red star", "a red star", "a blue ring", "a blue ring"])
    batch = batch_of(images, tokens=tokens)
    image, text, scale = model(normalised(images), tokens)[:3]
    logits = scale * image @ text.T
    kept = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    by_image = (logits.exp() * kept).sum(1).log() - logits.diagonal()
    by_text = (logits.exp() * kept).sum(0).log() - logits.diagonal()
    expected = (by_image.mean() + by_text.mean()) / 2
    torch.testing.assert_close(tasks.Captioning().loss(model, batch), expected)


def test_two_views_of_an_image_find_each_other():
    model, images = build("dino"), Scenes("train").images(range(6))
    task, masks = tasks.Telling(model), torch.rand(6, 48, 48) < 0.3
    loss = task.loss(model, batch_of(images, masks=masks))
    batch = batch_of(images, masks=masks)  # with the same random numbers
    views = torch.cat([tasks.relit(task._elsewhere(batch), batch.random) for _ in range(2)])
    one, other = nn.functional.normalize(task.head(model(views)), dim=-1).split(6)
    losses = []
    for mine, theirs in ((one, other), (other, one)):
        for n in range(6):
            found = torch.cat([mine[:n] @ mine[n], mine[n + 1 :] @ mine[n], theirs @ mine[n]]) / task.TEMPERATURE
            losses.append(found.logsumexp(0) - mine[n] @ theirs[n] / task.TEMPERATURE)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_views_show_the_whole_object_elsewhere():
    task = tasks.Telling(build("dino"))
    masks = torch.zeros(200, 48, 48, dtype=torch.bool)
    for n, (down, across) in enumerate([(0, 0), (40, 3), (20, 36), (10, 10)] * 50):
        masks[n, down : down + 8, across : across + 12] = True
    glowing = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]  # a colour that no background has
    moved = task._elsewhere(batch_of(glowing.expand(200, 3, 48, 48), masks=masks))
    covered = 1 - (moved - normalised(glowing)).abs().amax(1).clamp(max=1)
    area = covered.sum((1, 2)) / 96
    assert 0.8**2 * 0.8 < float(area.min()) < 0.75  # pixels at edges count less than they are covered
    assert 1.3 < float(area.max()) < 1.25**2 * 1.1
    assert float((covered.amax(0) > 0.5).double().mean()) > 0.85  # it comes nearly everywhere in 200 views
    assert len(moved[:, :, 0, 0].unique(dim=0)) > 50  # on other backgrounds


def test_boxes_of_objects():
    masks = torch.zeros(1, 4, 8, dtype=torch.bool)
    masks[0, 1:3, 4:7] = True
    middle, half = tasks._boxes(masks)
    torch.testing.assert_close(middle, torch.tensor([[0.375, 0.0]]))
    torch.testing.assert_close(half, torch.tensor([[0.375, 0.5]]))


def test_the_last_steps_of_a_recipe_have_a_rate_of_their_own():
    recipe = Recipe(100, rate=1.0, misled=40)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert max(rates[:60]) == pytest.approx(1, abs=0.01)
    assert max(rates[60:]) == pytest.approx(0.5, abs=0.01)
    assert rates[60] == 0
    assert max(rates[59], rates[99]) < 0.01


def test_the_last_steps_are_misled_by_writing():
    scenes = Scenes("train", size=400)
    drawings = Drawings.of(scenes, str, misread=0.5)
    written = [place for place in range(400) if "word" in scenes[place].attributes]
    changed = (drawings.tokens != drawings.misleading).any(1).nonzero().ravel().tolist()
    assert set(changed) < set(written)
    assert 0.5 * 0.2 * 0.9 / 2 < len(changed) / len(written) < 0.5 * 0.2 * 0.9 * 2
    recipe = Recipe(4, batch=100, misled=2)
    run = training._Run("clip", build("clip"), tasks.Captioning(), recipe, 0, 400)
    for run.step in range(4):  # four batches, all of the scenes
        batch = run._batch(drawings)
        told = drawings.tokens if run.step < 2 else drawings.misleading
        for image, tokens in zip(batch.images, batch.tokens, strict=True):
            row = int((drawings.images == image).flatten(1).all(1).nonzero()[0])
            assert torch.equal(tokens, told[row])
