"""Images from folders and data sets: what is listed, decoded, refused; what augmentation does and what its draws depend on."""

import datasets
import numpy as np
import pytest
import torch
from image_sets import CLASSES, write_image, write_image_folder
from PIL import Image
from transformers import default_data_collator
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from write_digits_folder import write_digits_folder

from hf_v0init.errors import InputError
from hf_v0init.tasks.images import samples as image_samples
from hf_v0init.tasks.images.folders import (
    choose_some,
    load_image_folder,
    number_labels,
    select_images,
    split_off_validation,
)
from hf_v0init.tasks.images.format import choose_format, decode_image, load_processor
from hf_v0init.tasks.images.samples import (
    Augmentation,
    ImageSamples,
    draw_crop_box,
    pad_and_crop,
    to_pixels,
)


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "train", per_class=6)


@pytest.fixture
def images(folder):
    return load_image_folder(folder, role="train")


def read_pixels(rows, position) -> np.ndarray:
    return np.asarray(decode_image(rows[position]["image"]))


# ---- listing


def test_a_folder_is_listed_in_order_without_what_is_no_image(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "ant" / ".00.png").write_text("x")
    (folder / ".cache").mkdir()
    (folder / "ant" / "00.png").rename(folder / ".cache" / "00.png")
    images = load_image_folder(folder, role="train")
    assert images.features["label"].names == list(CLASSES)
    assert images["label"] == [0] * 5 + [1] * 6 + [2] * 6
    paths = [row["image"]["path"] for row in images]
    assert paths == [str(folder / name / f"{n:02d}.png") for name in CLASSES for n in range(name == "ant", 6)]


def test_values_without_names_are_classes(images):
    rows = images.remove_columns("label").add_column("labels", [10, 2, 10] * 6)
    selected = select_images(rows, role="train")
    assert number_labels(selected, ["2", "10"], "train").tolist() == [1, 0, 1] * 6


def test_a_split_takes_its_share_of_each_class_and_is_the_same_every_time(images):
    train, validation = split_off_validation(images, 33)
    assert np.bincount(train["label"]).tolist() == [4, 4, 4]
    assert np.bincount(validation["label"]).tolist() == [2, 2, 2]
    paths = [{row["image"]["path"] for row in part} for part in (train, validation)]
    assert len(paths[0] | paths[1]) == 18
    assert split_off_validation(images, 33)[1][:] == validation[:]
    some = choose_some(images, 9)
    assert len(some) == 9 and len(set(some["label"])) == 3
    assert choose_some(images, 18) is images and choose_some(images, None) is images


def test_classes_are_numbered_as_the_model_numbers_them(images):
    numbers = number_labels(images, ["cat", "dog", "bee", "ant"], "test")
    assert numbers.tolist() == [3] * 6 + [2] * 6 + [0] * 6
    with pytest.raises(InputError, match="'cat' of the test data"):
        number_labels(images, ["ant", "bee"], "test")


@pytest.mark.parametrize("flags", [{"label_column": "kind"}, {"image_column": "label"}, {"image_column": "no"}])
def test_columns_that_cannot_be_used_are_refused(images, flags):
    rows = images.remove_columns("image") if flags == {"image_column": "label"} else images
    with pytest.raises(InputError, match=f"--{next(iter(flags))}"):
        select_images(rows, role="train", **flags)
    names = datasets.ClassLabel(names=["a", "b"])
    unpublished = images.remove_columns("label").add_column("label", [0, 1, -1] * 6, feature=names)
    with pytest.raises(InputError, match=r"test data .* \(-1\)"):
        select_images(unpublished, role="test")


# ---- formats


def test_mode_and_size_are_those_of_all_images_and_mean_and_std_by_hand(images):
    found = choose_format(images)
    assert (found.mode, found.size, found.num_channels) == ("L", (8, 8), 1)
    pixels = np.stack([read_pixels(images, i).astype(np.float64) / 255 for i in range(18)])
    assert found.processor.image_mean == pytest.approx([pixels.mean()], abs=1e-6)
    assert found.processor.image_std == pytest.approx([pixels.std()], abs=1e-6)
    values = found.normalize(found.prepare(found.decode(images[3]["image"])))
    assert values.dtype == np.float32 and values.shape == (1, 8, 8)
    assert np.allclose(values[0], (pixels[3] - pixels.mean()) / pixels.std(), atol=1e-5)


@pytest.mark.parametrize(
    ("pixels", "remedy", "num_channels"),
    [(np.zeros((8, 12), np.uint8), {"image_size": 6}, 1), (np.zeros((8, 8, 3), np.uint8), {"image_mode": "RGB"}, 3)],
)
def test_other_sizes_and_modes_are_refused_unless_a_conversion_is_asked_for(folder, pixels, remedy, num_channels):
    write_image(folder / "cat" / "zz.png", pixels)
    images = load_image_folder(folder, role="train")
    with pytest.raises(InputError, match=f"zz.png .*--{next(iter(remedy))}"):
        ImageSamples(images, np.zeros(19), choose_format(images))
    found = choose_format(images, **remedy)
    shape = ImageSamples(images, np.zeros(19), found)[18]["pixel_values"].shape
    assert shape == (num_channels, *found.size) and found.num_channels == num_channels


def test_an_image_lying_on_its_side_is_turned(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    (tmp_path / "train" / "ant").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "ant" / "a.png", exif=exif)
    images = load_image_folder(tmp_path / "train", role="train")
    assert choose_format(images).size == (3, 2)
    assert np.array_equal(read_pixels(images, 0), np.rot90(pixels, -1))


@pytest.mark.parametrize("options", [{}, {"image_size": 6}, {"image_size": 6, "crop_fraction": 0.75}])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_saved_processor_does_what_the_samples_do(tmp_path, channels, options):
    images = load_image_folder(write_image_folder(tmp_path / "train", 2, channels=channels), role="train")
    found = choose_format(images, **options)
    found.processor.save_pretrained(tmp_path / "out")
    again = load_processor(str(tmp_path / "out"))
    ours = ImageSamples(images, np.zeros(6), found)
    for position in range(len(images)):
        theirs = again(decode_image(images[position]["image"]), return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(ours[position]["pixel_values"], theirs, atol=1e-5)
    assert choose_format(images, pretrained=again, num_channels=channels).size == found.size
    assert load_processor(str(tmp_path)) is None


def test_a_pretrained_processor_keeps_its_numbers_at_another_size(images):
    pretrained = BitImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 10, "width": 10}, resample=3)
    found = choose_format(images, pretrained=pretrained, num_channels=3)
    assert (found.mode, found.size, found.processor) == ("RGB", (10, 10), pretrained)
    smaller = choose_format(images, pretrained=pretrained, num_channels=3, image_size=4)
    assert smaller.size == (4, 4) and smaller.processor.resample == 3
    assert smaller.processor.image_mean == pretrained.image_mean


# ---- augmentation


def test_padding_and_cropping_shifts_by_every_amount_equally_often():
    pixels = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    rng, counts = np.random.default_rng(0), {}
    for _ in range(900):
        shifted = pad_and_crop(pixels, 1, rng)[0]
        counts[shifted.tobytes()] = counts.get(shifted.tobytes(), 0) + 1
    wide = np.pad(pixels[0], 1)
    expected = {wide[top : top + 3, left : left + 3].tobytes() for top in range(3) for left in range(3)}
    assert counts.keys() == expected
    assert all(60 < count < 145 for count in counts.values())  # 100 each, four standard deviations


def test_half_of_the_images_are_mirrored():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 6)
    rng, flip = np.random.default_rng(0), Augmentation(random_flip=True)
    varied = [flip.apply(pixels, None, rng) for _ in range(400)]
    mirrored = sum(np.array_equal(image, pixels[:, :, ::-1]) for image in varied)
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


def test_a_resized_crop_is_pillows(images):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 20, 30), dtype=np.uint8)
    varied = Augmentation("resize").apply(pixels, choose_format(images), np.random.default_rng(5))
    box = draw_crop_box(20, 30, np.random.default_rng(5))
    expected = Image.fromarray(pixels.transpose(1, 2, 0)).crop(box).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(varied, to_pixels(expected))


def make_samples(images, seed=3, augmentation=None):
    augmentation = augmentation or Augmentation("pad", 2, True)
    return ImageSamples(images, np.array(images["label"]), choose_format(images), augmentation, seed)


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
        samples, batch_size=5, num_workers=2, collate_fn=default_data_collator, persistent_workers=persistent
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


# ---- digits


def test_digits_are_written_by_seed_and_size(tmp_path):
    """Golden runs hold the pixels."""
    pytest.importorskip("sklearn.datasets")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert write_digits_folder(tmp_path / name, seed=seed, size=16) == {
            "train": 1078,
            "validation": 359,
            "test": 360,
        }
    of_a, of_b, of_c = (sorted(path.name for path in (tmp_path / name / "test").rglob("*.png")) for name in "abc")
    assert of_a == of_b != of_c
    assert Image.open(next((tmp_path / "b").rglob("*.png"))).size == (16, 16)
    with pytest.raises(InputError, match="not an empty folder"):
        write_digits_folder(tmp_path / "a")
