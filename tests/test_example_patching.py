"""The example of patching: it finds the head that a change of the scene alone says it should."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS
from torch.nn import functional

import vitdecomp_lens
from vitdecomp_lens import testbed

PATH = Path(vitdecomp_lens.__file__).parent.parent / "examples" / "patch_the_colour.py"
COUNT = 64


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("patch_the_colour", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def rankings(example, name, seed):
    subject, pictures = example.Subject.of_testbed(name, "colour"), example.twins("colour", COUNT, seed)
    return example.by_patching(subject, pictures), example.by_scenes(subject, pictures)


def test_twins_differ_in_the_colour_of_the_object_and_in_nothing_else(example):
    pictures = example.twins("colour", 20, 3)
    scenes = testbed.Scenes("test", seed=3, size=20).scenes(range(20))
    assert torch.equal(pictures.one, torch.stack([scene.image for scene in scenes]))
    objects = torch.stack([scene.masks["object"] for scene in scenes]).float()
    beside = functional.max_pool2d(objects[:, None], 5, stride=1, padding=2)[:, 0] == 0
    changed = (pictures.one != pictures.other).any(1)
    assert changed.flatten(1).any(1).all()
    assert not (changed & beside).any()
    assert all(
        scene.attributes["colour"] == testbed.ATTRIBUTES["colour"][value]
        for scene, value in zip(scenes, pictures.values[0].tolist(), strict=True)
    )
    assert (pictures.values[0] != pictures.values[1]).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patching_finds_the_head_of_the_clip_that_the_scenes_say(example, seed):
    patched, changed = rankings(example, "clip", seed)
    assert patched.top(2) == changed.top(2) == ["L3H1", "L3H0"]
    assert patched.apart
    assert changed.apart


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_no_one_head_has_the_colour_both_say_so(example, seed):
    """In the DeiT three heads have about as much of it, and the example does not claim a first one."""
    patched, changed = rankings(example, "deit", seed)
    assert not (patched.apart and changed.apart)
    both = torch.stack([ranking.moved.mean(-1).flatten() for ranking in (patched, changed)])
    assert torch.corrcoef(both)[0, 1] > 0.8
    assert patched.top(1)[0] in changed.top(3)
    assert changed.top(1)[0] in patched.top(4)


def test_a_patch_is_the_other_drawings_head(example):
    subject, pictures = example.Subject.of_testbed("clip", "colour"), example.twins("colour", 6, 0)
    one, other = (subject.taken(scenes) for scenes in (pictures.one, pictures.other))
    model, hook = subject.model, "blocks.3.attn.hook_z"
    effects = []
    with torch.no_grad():
        for source, base, pair in ((one, other, pictures.values), (other, one, pictures.values[::-1])):
            there = model.run_with_cache(source)[1][hook]

            def put(value, hook, there=there):
                value[:, :, 1] = there[:, :, 1]
                return value

            before = subject.scores(model(base))
            after = subject.scores(model.run_with_hooks(base, fwd_hooks=[(hook, put)]))
            effects.append(example.answers(after, pair) - example.answers(before, pair))
        found = example.by_patching(subject, pictures).moved[3, 1]
    torch.testing.assert_close(found, (effects[0] + effects[1]) / 2, rtol=1e-4, atol=1e-4)


def test_any_clip_is_read_by_texts(example):
    clip = TINY_MODELS["open_clip_whole"]()

    def tokenizer(texts):
        return torch.tensor([[ord(letter) % 60 + 1 for letter in text[15:23]] for text in texts])

    subject = example.Subject.of_clip(clip, tokenizer, "colour")
    pictures = example.twins("colour", 3, 0)
    assert subject.taken(pictures.one).shape == (3, 3, 32, 32)
    with torch.no_grad():
        assert example.by_patching(subject, pictures).moved.shape == (2, 4, 3)
        assert example.by_scenes(subject, pictures).moved.shape == (2, 4, 3)
    assert subject.directions.shape == (len(testbed.ATTRIBUTES["colour"]), 24)


def test_a_head_stands_apart_by_its_difference_in_the_same_scenes(example):
    level = torch.linspace(0, 10, 20)
    ranking = example.Ranking(torch.stack([level + 1, level, 0 * level]).reshape(1, 3, 20))
    assert ranking.top(2) == ["L0H0", "L0H1"]
    assert ranking.apart
    assert not example.Ranking(torch.stack([level, level.flip(0)]).reshape(1, 2, 20)).apart
    assert ranking.show(1) == "L0H0 6.00 ± 1.36"
