"""Photographs become images as the library would make them, and the way back to their pixels is known."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tiny_models import TINY_MODELS

from vitdecomp_lens.errors import InputError
from vitdecomp_lens.explain import explain
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.preprocess import open_upright, seen_rectangle, to_batch

SIZES = [(100, 60), (60, 100), (64, 64), (37, 211)]


def gradient(width, height):
    """A photograph whose red and green channels are each pixel's own place, in 255ths of the width and height."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


def timm_transform(size, crop_pct, crop_mode):
    return create_transform(
        input_size=(3, size, size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bilinear",
        mean=(0, 0, 0), std=(1, 1, 1), is_training=False,
    )  # fmt: skip


def clip_transform(size, mode):
    cfg = PreprocessCfg(size=size, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", resize_mode=mode)
    return image_transform_v2(cfg, is_train=False)


TRANSFORMS = {
    "timm center": timm_transform(48, 0.875, "center"),
    "timm center whole": timm_transform(48, 1.0, "center"),
    "timm squash": timm_transform(48, 0.9, "squash"),
    "timm border": timm_transform(48, 1.0, "border"),
    "open_clip shortest": clip_transform(48, "shortest"),
    "open_clip longest": clip_transform(48, "longest"),
    "open_clip squash": clip_transform(48, "squash"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_the_seen_rectangle_is_where_a_gradient_says(name, size):
    photograph = gradient(*size)
    left, top, right, bottom = seen_rectangle(photograph, TRANSFORMS[name])
    image = TRANSFORMS[name](photograph)
    assert image.shape == (3, 48, 48)
    for channel, (low, high, extent) in enumerate(((left, right, size[0]), (top, bottom, size[1]))):
        values = image[channel].mean(1 if channel else 0) if name.split()[1] not in ("border", "longest") else None
        if values is None:  # padded: read the line through the middle
            values = image[channel][:, 24] if channel else image[channel][24]
        centres = low + (np.arange(48) + 0.5) * (high - low) / 48  # in pixels of the photograph
        reach = 1.5 * max((high - low) / 48, 1)  # of the filter, which bends a gradient at its ends
        inside = (centres > reach) & (centres < extent - reach)
        expected = (centres - 0.5) / (extent - 1)
        assert inside.sum() >= 3
        assert np.abs(values.numpy()[inside] - expected[inside]).max() < 0.006


def test_a_plain_center_crop_is_known_in_numbers():
    assert seen_rectangle(gradient(200, 100), timm_transform(50, 1.0, "center")) == (50.0, 0.0, 150.0, 100.0)
    assert seen_rectangle(gradient(200, 100), timm_transform(50, 0.5, "center")) == (75.0, 25.0, 125.0, 75.0)
    assert seen_rectangle(gradient(200, 100), clip_transform(50, "squash")) == (0.0, 0.0, 200.0, 100.0)
    assert seen_rectangle(gradient(200, 100), clip_transform(50, "longest")) == (0.0, -48.0, 200.0, 152.0)


def test_unknown_resizing_is_refused():
    def crop_left(image):
        return image.crop((0, 0, 10, 10))

    with pytest.raises(InputError, match="function changes the size"):
        seen_rectangle(gradient(20, 20), crop_left)


def test_timm_models_use_timms_transform():
    model = HookedViT.from_timm("test_vit")
    photograph = gradient(300, 200)
    expected = create_transform(**resolve_data_config({}, model=model.original))(photograph)
    batch = model.preprocess([photograph, photograph])
    assert torch.equal(batch, torch.stack([expected, expected]))
    model.check_images(batch)
    left, top, right, bottom = model.preprocess_geometry(photograph)
    assert right - left == pytest.approx(bottom - top)
    assert (left + right) / 2 == pytest.approx(150, abs=1)


def test_open_clip_models_use_open_clips_transform():
    clip = open_clip.create_model("ViT-B-32", vision_cfg={"layers": 1, "width": 64, "image_size": 64, "patch_size": 16})
    model, photograph = HookedViT(clip.eval()), gradient(90, 120)
    expected = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)(photograph)
    assert torch.equal(model.preprocess([photograph])[0], expected)
    assert torch.equal(HookedViT(clip.visual).preprocess([photograph])[0], expected)


def test_towers_without_settings_take_open_clips_defaults_at_their_size():
    model = HookedViT(TINY_MODELS["open_clip"]())
    assert model.preprocess([gradient(40, 50)]).shape == (1, 3, 32, 32)


def test_preprocessing_follows_the_models_dtype():
    model = HookedViT(TINY_MODELS["timm_test_vit"]()).to(torch.float64)
    assert model.preprocess([gradient(200, 200)]).dtype == torch.float64


def test_paths_and_other_modes_are_read(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (20, 10), 128).save(path)
    transform = timm_transform(8, 1.0, "center")
    batch = to_batch([path, str(path), Image.new("RGBA", (9, 9))], transform)
    assert batch.shape == (3, 3, 8, 8)
    assert torch.equal(batch[0], batch[1])
    assert seen_rectangle(path, transform) == (5.0, 0.0, 15.0, 10.0)


@pytest.mark.parametrize("content", [None, b"no image at all", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_photographs_are_refused_by_name(tmp_path, content):
    path = tmp_path / "holiday.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"holiday\.png' cannot be read.*Leave it out"):
        to_batch([path], timm_transform(8, 1.0, "center"))


def test_truncated_photographs_are_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    gradient(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"cut\.jpg' cannot be read"):
        to_batch([path], timm_transform(8, 1.0, "center"))


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to show
    upright, path, transform = gradient(90, 60), tmp_path / "turned.png", timm_transform(8, 1.0, "center")
    upright.rotate(90, expand=True).save(path, exif=exif)
    with Image.open(path) as opened:
        batch = to_batch([path, opened, upright], transform)
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[1], batch[2])
    assert seen_rectangle(path, transform) == seen_rectangle(upright, transform) == (15.0, 0.0, 75.0, 60.0)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    grey = gradient(48, 48).getchannel("R")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_upright(tmp_path / "deep.png")), np.asarray(grey.convert("RGB")))


def test_palettes_with_transparency_are_read_without_a_warning(tmp_path):
    path = tmp_path / "palette.png"
    gradient(9, 9).convert("P").save(path, transparency=bytes(range(256)))
    assert open_upright(path).mode == "RGB"


@pytest.mark.parametrize(
    "error", [SyntaxError("broken"), ValueError("broken"), EOFError("broken"), Image.DecompressionBombError("broken")]
)
def test_whatever_a_reader_raises_names_the_photograph(tmp_path, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=r"holiday\.png' cannot be read: broken\. Leave it out"):
        to_batch([tmp_path / "holiday.png"], timm_transform(8, 1.0, "center"))


def test_huge_photographs_and_folders_are_refused_by_name(tmp_path, monkeypatch):
    gradient(60, 60).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"huge\.png' cannot be read.*exceeds limit"):
        to_batch([tmp_path / "huge.png"], timm_transform(8, 1.0, "center"))
    with pytest.raises(InputError, match=r"is a folder\. Name the files in it"):
        to_batch([tmp_path], timm_transform(8, 1.0, "center"))


def test_a_model_sees_what_explain_says_that_it_sees(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(300, 200).save(tmp_path / "turned.jpg", exif=exif)
    model = HookedViT.from_timm("test_vit")
    (explanation,) = explain(model, [tmp_path / "turned.jpg"], class_=3, top=0)
    logits = model(model.preprocess([tmp_path / "turned.jpg"]))
    assert explanation.size == (200, 300)
    assert explanation.logit == pytest.approx(logits[0, 3].item(), abs=1e-5)


def test_something_else_than_a_list_of_photographs_is_refused():
    transform = timm_transform(8, 1.0, "center")
    with pytest.raises(InputError, match=r"Pass \[photograph\]"):
        to_batch(gradient(9, 9), transform)
    with pytest.raises(InputError, match="no photographs"):
        to_batch([], transform)
    with pytest.raises(InputError, match="PIL images or paths; got int"):
        to_batch([3], transform)


# Creating models -------------------------------------------------------------------------------------------


def test_creating_from_timm_passes_everything_on(monkeypatch):
    seen = []

    def create_model(*args, **kwargs):
        seen.append((args, kwargs))
        return TINY_MODELS["class_token"]().train()

    monkeypatch.setattr(timm, "create_model", create_model)
    model = HookedViT.from_timm("vit_base_patch16_224.dino", pretrained=True, num_classes=7)
    HookedViT.from_timm("deit_tiny_patch16_224")
    assert seen == [
        (("vit_base_patch16_224.dino",), {"pretrained": True, "num_classes": 7}),
        (("deit_tiny_patch16_224",), {"pretrained": False}),
    ]
    assert not model.training


def test_creating_from_open_clip_passes_everything_on(monkeypatch):
    seen = []

    def create_model(*args, **kwargs):
        seen.append((args, kwargs))
        return TINY_MODELS["open_clip_whole"]().train()

    monkeypatch.setattr(open_clip, "create_model", create_model)
    model = HookedViT.from_open_clip("ViT-B-16", pretrained="laion2b_s34b_b88k", precision="fp32")
    HookedViT.from_open_clip("ViT-B-32")
    assert seen == [
        (("ViT-B-16",), {"pretrained": "laion2b_s34b_b88k", "precision": "fp32"}),
        (("ViT-B-32",), {"pretrained": None}),
    ]
    assert not model.training
    assert type(model.original).__name__ == "VisionTransformer"
