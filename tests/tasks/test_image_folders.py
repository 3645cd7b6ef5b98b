"""Images from folders and data sets: what is listed, decoded, refused; what augmentation does and what its draws depend on."""

import datasets
import numpy as np
import pytest
import torch
from image_sets import CLASSES, write_image, write_image_folder
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_v0init.errors import InputError
from hf_v0init.tasks.images import samples as image_samples
from hf_v0init.tasks.images.augmentation import Augmentation, draw_crop_box, pad_and_crop, to_pixels
from hf_v0init.tasks.images.digits import write_digits_folder
from hf_v0init.tasks.images.folders import (
    choose_some,
    load_image_folder,
    number_classes,
    require_usable_classes,
    select_images,
    split_off_validation,
)
from hf_v0init.tasks.images.format import (
    ImageFormat,
    build_processor,
    choose_format,
    decode_image,
    load_format,
    measure_mean_and_std,
)
from hf_v0init.tasks.images.samples import ImageSamples, stack_samples


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "train", per_class=6)


@pytest.fixture
def images(folder):
    return load_image_folder(folder, role="train")


# ---- listing


def test_a_folder_is_listed_in_order_without_what_is_no_image(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "ant" / ".00.png").write_text("x")
    (folder / ".cache").mkdir()
    images = load_image_folder(folder, role="train")
    assert images.class_names == list(CLASSES)
    assert images.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    paths = [row["image"]["path"] for row in images.rows]
    assert paths == [str(folder / name / f"{number:02d}.png") for name in CLASSES for number in range(6)]


def test_folders_and_data_sets_give_the_same_pixels(folder, images):
    named = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").rename_column("image", "img")
    selected = select_images(named, role="train")
    assert selected.class_names == images.class_names
    assert selected.labels.tolist() == images.labels.tolist()
    for position in range(len(images)):
        assert np.array_equal(np.asarray(decode_image(selected, position)), np.asarray(decode_image(images, position)))


def test_labels_without_names_are_sorted_values(images):
    rows = images.rows.add_column("labels", [10, 2, 10] * 6)
    selected = select_images(rows, role="train")
    assert selected.class_names == ["2", "10"]
    assert selected.labels.tolist() == [1, 0, 1] * 6


def test_a_split_takes_its_share_of_each_class_and_is_the_same_every_time(images):
    train, validation = split_off_validation(images, 34)
    assert np.bincount(train.labels).tolist() == [4, 4, 4]
    assert np.bincount(validation.labels).tolist() == [2, 2, 2]
    assert validation.role == "validation"
    paths = [{row["image"]["path"] for row in part.rows} for part in (train, validation)]
    assert len(paths[0] | paths[1]) == 18
    again = split_off_validation(images, 34)[1]
    assert [row["image"]["path"] for row in again.rows] == [row["image"]["path"] for row in validation.rows]


def test_a_limit_takes_images_of_all_classes(images):
    some = choose_some(images, 9)
    assert len(some) == 9 and len(np.unique(some.labels)) == 3
    assert choose_some(images, 18) is images and choose_some(images, None) is images


def test_classes_are_numbered_as_the_model_numbers_them(images):
    numbered = number_classes(images, ["cat", "dog", "bee", "ant"])
    assert numbered.labels.tolist() == [3] * 6 + [2] * 6 + [0] * 6
    with pytest.raises(InputError, match="does not know class 'cat'"):
        number_classes(images, ["ant", "bee"])


def make_bad(kind: str, folder):
    """(what is called, words of its complaint)"""
    load = lambda: load_image_folder(folder, role="train")  # noqa: E731
    if kind == "missing":
        return lambda: load_image_folder(folder / "no", role="train"), ["--train_dir", "no such folder"]
    if kind == "no classes":
        return lambda: load_image_folder(folder / "ant", role="train"), ["no subfolders"]
    if kind == "empty class":
        (folder / "dog").mkdir()
        return load, ["dog", "no image"]
    if kind == "splits taken for classes":
        return lambda: load_image_folder(folder.parent, role="train"), ["train", "no image directly"]
    if kind == "one class":
        return lambda: require_usable_classes({"train": load_one(folder)}), ["one class only (ant)"]
    if kind == "one class by limit":
        part = load().take(np.arange(5))
        return lambda: require_usable_classes({"train": part}), ["5 training images", "'ant'"]
    if kind == "class only in training":
        other = write_image_folder(folder.parent / "validation", 2, classes=CLASSES[:2])
        return lambda: require_both(load(), other), ["'cat'", "train data", "no class of the validation data"]
    if kind == "class only in validation":
        other = write_image_folder(folder.parent / "validation", 2, classes=(*CLASSES, "dog", "eel"))
        return lambda: require_both(load(), other), ["'dog' and 1 more", "no class of the train data"]
    if kind == "split of too few":
        return lambda: split_off_validation(load(), 5), ["--validation_split_percentage=5", "6 images of class 'ant'"]
    raise AssertionError(kind)


def load_one(folder):
    return load_image_folder(write_image_folder(folder.parent / "one", 3, classes=("ant",)), role="train")


def require_both(train, other):
    require_usable_classes({"train": train, "validation": load_image_folder(other, role="validation")})


@pytest.mark.parametrize(
    "kind",
    "missing, no classes, empty class, splits taken for classes, one class, one class by limit, class only in training, "
    "class only in validation, split of too few".split(", "),
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(folder, kind):
    call, words = make_bad(kind, folder)
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("columns", "flags", "words"),
    [
        ({}, {}, ["--label_column is missing"]),
        ({"label": [0.5] * 18}, {}, ["--label_column=label", "no classes"]),
        ({"label": [0] * 18}, {"label_column": "kind"}, ["--label_column=kind", "image, label"]),
        ({"label": [0] * 18}, {"image_column": "label"}, ["--image_column=label", "no images"]),
    ],
)
def test_columns_that_cannot_be_used_are_refused(images, columns, flags, words):
    rows = images.rows
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    with pytest.raises(InputError) as caught:
        select_images(rows, role="train", **flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unpublished_labels_are_refused(images):
    kind = datasets.ClassLabel(names=["a", "b"])
    rows = images.rows.add_column("label", [0, 1, -1] * 6, feature=kind)
    with pytest.raises(InputError, match=r"row 2 of the test data has no label \(-1\)"):
        select_images(rows, role="test")


# ---- formats


def test_mode_and_size_are_those_of_all_images_and_mean_and_std_by_hand(images):
    found = choose_format({"train": images})
    assert (found.mode, found.size, found.num_channels) == ("L", (8, 8), 1)
    found = measure_mean_and_std(images, found)
    pixels = np.stack([np.asarray(decode_image(images, i), dtype=np.float64) / 255 for i in range(18)])
    assert found.mean == pytest.approx((pixels.mean(),), abs=1e-6)
    assert found.std == pytest.approx((pixels.std(),), abs=1e-6)
    values = found.normalize(found.prepare(decode_image(images, 3)))
    assert values.dtype == np.float32 and values.shape == (1, 8, 8)
    assert np.allclose(values[0], (pixels[3] - pixels.mean()) / pixels.std(), atol=1e-5)


def test_other_sizes_and_modes_are_refused_unless_a_conversion_is_asked_for(folder):
    write_image(folder / "bee" / "wide.png", np.zeros((8, 12), np.uint8))
    images = load_image_folder(folder, role="train")
    with pytest.raises(InputError, match=r"00\.png is 8x8, .*wide\.png is 12x8\); give --image_size"):
        choose_format({"train": images})
    assert choose_format({"train": images}, image_size=6).size == (6, 6)
    write_image(folder / "cat" / "red.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "bee" / "wide.png").unlink()
    images = load_image_folder(folder, role="train")
    with pytest.raises(InputError, match=r"00\.png is L, .*red\.png is RGB\); give --image_mode"):
        choose_format({"train": images})
    assert choose_format({"train": images}, image_mode="RGB").num_channels == 3
    transparent = write_image_folder(folder.parent / "four", 2, channels=4)
    with pytest.raises(InputError, match="colour mode is RGBA; give --image_mode"):
        choose_format({"train": load_image_folder(transparent, role="train")})


def test_sizes_must_agree_between_splits_too(folder, images):
    other = load_image_folder(write_image_folder(folder.parent / "validation", 2, size=(9, 8)), role="validation")
    with pytest.raises(InputError, match=r"8x8.* is 8x9"):
        choose_format({"train": images, "validation": other})


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_broken_file_is_named_before_training(folder, damage):
    path = folder / "bee" / "03.png"
    path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:60])
    images = load_image_folder(folder, role="train")
    with pytest.raises(InputError) as caught:
        ImageSamples(images, measure_mean_and_std(images.take(np.arange(6)), choose_format({"train": images})))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_lying_on_its_side_is_turned(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "ant" / "a.png", exif=exif)
    images = load_image_folder(tmp_path / "train", role="train")
    assert choose_format({"train": images}).size == (3, 2)
    assert np.array_equal(np.asarray(decode_image(images, 0)), np.rot90(pixels, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_saved_processor_does_what_the_samples_do(tmp_path, channels):
    images = load_image_folder(write_image_folder(tmp_path / "train", 2, channels=channels), role="train")
    found = measure_mean_and_std(images, choose_format({"train": images}))
    processor = build_processor(found)
    processor.save_pretrained(tmp_path / "out")
    again = BitImageProcessorPil.from_pretrained(tmp_path / "out")
    ours = ImageSamples(images, found)
    for position in range(len(images)):
        theirs = again(decode_image(images, position), return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(ours[position]["pixel_values"], theirs, atol=1e-5)
    assert load_format(str(tmp_path / "out"), channels) == found


def test_a_crop_from_the_centre_is_nearly_that_of_two_steps():
    """256 of the shorter side, then 224 from the centre, as the usual recipe has it, on a smooth image of 300x400."""
    rows, columns = np.mgrid[0:300, 0:400]
    image = Image.fromarray((127 + 60 * np.sin(rows / 40) + 60 * np.cos(columns / 55)).astype(np.uint8))
    one_step = ImageFormat("L", 224, 224, crop_fraction=0.875).prepare(image)[:, :, 0].astype(float)
    resized = image.resize((round(400 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left = (resized.size[0] - 224) // 2
    two_steps = np.asarray(resized.crop((left, 16, left + 224, 240))).astype(float)
    assert np.abs(one_step - two_steps).max() <= 3


def test_a_models_own_format_is_read_from_its_processor(tmp_path):
    settings = {"shortest_edge": 256}, {"height": 224, "width": 224}
    processor = BitImageProcessorPil(size=settings[0], crop_size=settings[1], resample=3)
    processor.save_pretrained(tmp_path / "m")
    found = load_format(str(tmp_path / "m"), 3)
    assert (found.mode, found.size, found.crop_fraction, found.resample) == ("RGB", (224, 224), 0.875, 3)
    assert found.mean == tuple(processor.image_mean)
    assert load_format(str(tmp_path), 3) is None


# ---- augmentation


def test_padding_and_cropping_shifts_by_every_amount_equally_often():
    pixels = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    rng, counts = np.random.default_rng(0), {}
    for _ in range(900):
        shifted = pad_and_crop(pixels, 1, rng)[:, :, 0]
        counts[shifted.tobytes()] = counts.get(shifted.tobytes(), 0) + 1
    wide = np.pad(pixels[:, :, 0], 1)
    expected = {wide[top : top + 3, left : left + 3].tobytes() for top in range(3) for left in range(3)}
    assert counts.keys() == expected
    assert all(60 < count < 145 for count in counts.values())  # 100 each, four standard deviations


def test_half_of_the_images_are_mirrored():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    rng, flip = np.random.default_rng(0), Augmentation(random_flip=True)
    varied = [flip.apply(pixels, (2, 6), 2, rng) for _ in range(400)]
    mirrored = sum(np.array_equal(image, pixels[:, ::-1]) for image in varied)
    assert mirrored + sum(np.array_equal(image, pixels) for image in varied) == 400
    assert 160 < mirrored < 240


def test_random_boxes_keep_their_bounds():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop_box(60, 90, rng) for _ in range(500)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 90).all() and (boxes[:, 3] <= 60).all()
    shares, ratios = widths * heights / (60 * 90), widths / heights
    assert 0.07 < shares.min() < 0.12 and shares.max() > 0.85
    assert 0.70 < ratios.min() < 0.80 and 1.28 < ratios.max() < 1.40
    assert draw_crop_box(4, 400, rng)[3] == 4  # no box of the wanted shape fits often: the fallback is inside, too


def test_a_resized_crop_is_pillows():
    rng = np.random.default_rng(5)
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    varied = Augmentation("resize").apply(pixels, (8, 8), 2, np.random.default_rng(5))
    box = draw_crop_box(20, 30, rng)
    expected = Image.fromarray(pixels).crop(box).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.abs(varied.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def make_samples(images, seed=3, augmentation=None):
    found = measure_mean_and_std(images, choose_format({"train": images}))
    return ImageSamples(images, found, augmentation or Augmentation("pad", 2, True), seed)


def read_all(samples) -> torch.Tensor:
    return torch.stack([samples[position]["pixel_values"] for position in range(len(samples))])


def test_draws_depend_on_seed_epoch_and_image_alone(images):
    samples = make_samples(images)
    first = read_all(samples)
    torch.manual_seed(77)
    np.random.seed(77)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    backwards = torch.stack([samples[position]["pixel_values"] for position in reversed(range(18))]).flip(0)
    assert torch.equal(backwards, first)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    samples.begin_epoch(1)
    second = read_all(samples)
    assert not torch.equal(second, first)
    other_seed = read_all(make_samples(images, seed=4))
    assert not torch.equal(other_seed, first)
    samples.begin_epoch(0)
    assert torch.equal(read_all(samples), first)


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_workers_draw_the_same(images, persistent):
    samples = make_samples(images)
    loader = torch.utils.data.DataLoader(
        samples, batch_size=5, num_workers=2, collate_fn=stack_samples, persistent_workers=persistent
    )
    for epoch in (0, 1):
        samples.begin_epoch(epoch)
        loaded = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(loaded, read_all(samples))


@pytest.mark.parametrize("crop", ["pad", "resize"])
def test_large_splits_are_decoded_when_needed_and_give_the_same(images, crop, monkeypatch):
    kept = make_samples(images, augmentation=Augmentation(crop, 2, True))
    monkeypatch.setattr(image_samples, "LARGEST_KEPT_BYTES", 100)
    lazy = make_samples(images, augmentation=Augmentation(crop, 2, True))
    assert kept._kept is not None and lazy._kept is None
    assert torch.equal(read_all(kept), read_all(lazy))


def test_evaluation_sees_the_images_as_they_are(images):
    samples = ImageSamples(images, measure_mean_and_std(images, choose_format({"train": images})))
    plain = to_pixels(decode_image(images, 4))
    assert np.array_equal(samples[4]["pixel_values"].numpy(), samples.image_format.normalize(plain))
    assert samples[4]["labels"] == 0 and samples[17]["labels"] == 2


# ---- digits


def test_digits_are_written_whole_and_by_seed(tmp_path):
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    counts = write_digits_folder(tmp_path / "a", seed=1)
    assert counts == {"train": 1078, "validation": 359, "test": 360}
    digits, found = load_digits(), {}
    for split in counts:
        images = load_image_folder(tmp_path / "a" / split, role="train")
        assert images.class_names == [str(digit) for digit in range(10)]
        shares = np.bincount(images.labels) / len(images)
        assert np.abs(shares - np.bincount(digits.target) / 1797).max() < 0.003
        for position in range(len(images)):
            number = int(images.describe(position)[-8:-4])
            found[number] = images.labels[position]
            if position % 50 == 0:
                levels = np.asarray(decode_image(images, position)) / 255 * 16
                assert np.abs(levels - digits.images[number]).max() <= 0.04  # rounding to one of 255 levels
    assert found == dict(enumerate(digits.target))
    names = [sorted(p.name for p in (tmp_path / "a" / "test").rglob("*.png"))]
    for name, seed in (("b", 1), ("c", 2)):
        write_digits_folder(tmp_path / name, seed=seed, size=16)
        names.append(sorted(p.name for p in (tmp_path / name / "test").rglob("*.png")))
    assert names[0] == names[1] != names[2]
    assert decode_image(load_image_folder(tmp_path / "b" / "test", role="test"), 0).size == (16, 16)
    with pytest.raises(InputError, match="not an empty folder"):
        write_digits_folder(tmp_path / "a")
    with pytest.raises(InputError, match="size=7"):
        write_digits_folder(tmp_path / "d", size=7)
