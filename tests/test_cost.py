"""What is never made, however long it would take to notice."""

import torch
from tiny_models import TINY_MODELS, images_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitdecomp_lens import HookedViT, attribute, attribute_tokens, decompose, request


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        # An expansion has a shape but no memory.
        self.seen += [tuple(t.shape) for t in made if t.untyped_storage().nbytes() >= t.nbytes]
        return out


def shapes_of(work):
    work()  # traced and compiled before one looks
    with Shapes() as shapes:
        work()
    return shapes.seen


def model_and_images(name):
    return HookedViT(TINY_MODELS[name]()), images_for(name, 3)


def directions(count):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


def test_a_class_token_never_needs_a_whole_pattern():
    model, images = model_and_images("class_token")
    u = directions(100)
    plain = {shape for shape in shapes_of(lambda: model(images)) if shape[-2:] == (17, 17)}
    seen = shapes_of(lambda: attribute_tokens(model, images, u, batch_size=3))
    assert not {shape for shape in seen if shape[-2:] == (17, 17)} - plain
    assert [shape for shape in seen if shape[-2:] == (1, 17)]  # the rows that the class token reads


def test_scores_are_made_without_vectors():
    model, images = model_and_images("mean_pool_with_class_token")
    u = directions(100)
    components = len(decompose(model, images))
    vectors = components * images.shape[0] * 32
    whole = max(torch.Size(shape).numel() for shape in shapes_of(lambda: decompose(model, images)))
    assert whole >= vectors
    for read in (attribute, attribute_tokens):
        seen = shapes_of(lambda read=read: read(model, images, u, batch_size=3))
        # No tensor has a vector of the representation's width for each head and image ...
        assert not [shape for shape in seen if len(shape) >= 3 and shape[-1] == 32 and shape[:2] in ((4, 3), (3, 4))]
        # ... nor for all components at once.
        assert not [shape for shape in seen if shape[:2] == (components, 3) and shape[-1] == 32]


def test_only_rows_that_are_read_are_kept_of_a_run(monkeypatch):
    model, images = model_and_images("class_token")
    kept = []
    capture = request.capture

    def spy(*args, **options):
        captured = capture(*args, **options)
        kept.append({name: tuple(value.shape) for name, value in captured.kept.items()})
        return captured

    monkeypatch.setattr(request, "capture", spy)
    decompose(model, images)
    assert kept[0]["blocks.0.attn.hook_z"] == (3, 1, 4, 8)
    assert kept[0]["blocks.1.hook_mlp_out"] == (3, 1, 32)
    assert kept[0]["hook_patch_embed"] == (3, 0, 32)


def test_a_batch_is_run_in_pieces_that_keep_little(monkeypatch):
    model, images = model_and_images("mean_pool_with_class_token")
    sizes = []
    capture = request.capture

    def spy(run, piece, *rest, **options):
        sizes.append(len(piece))
        return capture(run, piece, *rest, **options)

    monkeypatch.setattr(request, "capture", spy)
    whole = decompose(model, images.repeat(3, 1, 1, 1))
    assert sizes == [9]
    monkeypatch.setitem(request.KEPT_BYTES, "cpu", 60_000)
    sizes.clear()
    pieces = decompose(model, images.repeat(3, 1, 1, 1))
    assert len(sizes) > 1
    assert max(sizes) - min(sizes) <= 1
    torch.testing.assert_close(pieces.values, whole.values)
