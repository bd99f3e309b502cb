"""Images: both forms of CIFAR-10 are read alike, a hostile pickle runs nothing, augmentation moves and mirrors only."""

from __future__ import annotations

import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from apps.balanced_sparsity.data.image_folder import ImageFolders
from apps.balanced_sparsity.data.images import cifar10, digits, shift_and_mirror
from apps.program.errors import UserError


def python_batches(folder, change=None):
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        batch = {b"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [0, 9, 3, 1]}
        (folder / name).write_bytes(pickle.dumps(change(batch) if change else batch, protocol=2))
    return folder


def test_python_batches_are_planes_of_red_green_and_blue(tmp_path):
    data = cifar10(str(python_batches(tmp_path / "batches")), None)
    assert data.train.pixels.shape == (20, 3, 32, 32) and len(data.test) == 4
    first = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)[1]
    assert data.train.pixels[1, 2, 5, 7] == first[2 * 1024 + 5 * 32 + 7] and int(data.train.labels[1]) == 9
    normal = data.normalised(data.train.pixels)
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(normal.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3)


mark = str(Path(tempfile.gettempdir()) / f"sextant-must-not-exist-{os.getpid()}")


class _Evil:
    def __reduce__(self):
        return (os.system, (f"touch {mark}",))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batch: {**batch, b"more": _Evil()}, "wants to make a posix.system"),
        (lambda batch: {b"labels": batch[b"labels"]}, "do not hold CIFAR-10's data"),
        (lambda batch: {**batch, b"labels": [0, 1, 2, 77]}, "not 0 to 9"),
        (lambda batch: [batch], "no batch of CIFAR-10"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        cifar10(str(python_batches(tmp_path / "batches", change)), None)
    assert not Path(mark).exists()


def class_folder(root, names, count=3, size=(8, 8)):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = np.full((*size, 3), (10, 100 + index, 40 * number), np.uint8)  # blue, green, red
            cv2.imwrite(str(root / name / f"{index}.png"), image)
    return root


def test_a_folder_a_class_and_its_archive_are_the_same_data(tmp_path):
    train, test = class_folder(tmp_path / "train", ["cat", "dog"]), class_folder(tmp_path / "test", ["dog"], count=1)
    with tarfile.open(tmp_path / "train.tar.xz", "w:xz") as archive:
        archive.add(train, "train")
    for path in (train, tmp_path / "train.tar.xz"):
        data = cifar10(str(path), str(test))
        assert data.classes == ("cat", "dog") and data.test.labels.tolist() == [1]
        for pixels, label in zip(data.train.pixels, data.train.labels, strict=True):
            red, green, blue = pixels[:, 0, 0].tolist()
            assert (red, blue) == (40 * int(label), 10) and 100 <= green < 103


def test_mistakes_with_folders_are_sentences(tmp_path):
    train = class_folder(tmp_path / "train", ["cat", "dog"])
    with pytest.raises(UserError, match="no data at .*Get CIFAR-10"):
        cifar10(str(tmp_path / "nothing"), str(train))
    with pytest.raises(UserError, match="names no images"):
        cifar10(str(train), None)
    with pytest.raises(UserError, match="has the class 'fish'"):
        cifar10(str(train), str(class_folder(tmp_path / "other", ["fish"])))
    (train / "cat" / "9.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="no image that can be decoded"):
        cifar10(str(train), str(train))


def test_digits_of_other_writers_are_held_out():
    data = digits()
    assert (len(data.train), len(data.test), data.shape) == (1500, 297, (1, 8, 8))
    assert int(data.train.pixels.max()) == 255


def test_shifted_images_are_the_image_moved_over_zeros():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    moved = shift_and_mirror(image.repeat(64, 1, 1, 1), 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    windows = [padded[top : top + 5, left : left + 5] for top in range(3) for left in range(3)]
    allowed = {tuple(w.flatten().tolist()) for w in windows} | {tuple(w.flip(1).flatten().tolist()) for w in windows}
    seen = {tuple(one.flatten().tolist()) for one in moved}
    assert seen <= allowed and len(seen) > 9
    again = shift_and_mirror(image.repeat(64, 1, 1, 1), 1, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_large_images_of_any_size_are_cropped_repeatably(tmp_path):
    train = class_folder(tmp_path / "train", ["a", "b"], size=(40, 60))
    data = ImageFolders(str(train), str(train), size=16, threads=2)
    indices = torch.tensor([0, 4])
    first, labels = data.training_batch(indices, seed=1, epoch=0)
    again, _ = data.training_batch(indices, seed=1, epoch=0)
    assert first.shape == (2, 3, 16, 16) and labels.tolist() == [0, 1] and torch.equal(first, again)
    tests, labels = data.test_batch(0, 6)
    assert tests.shape == (6, 3, 16, 16) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert float(tests[3, 0, 0, 0]) == pytest.approx(
        (40 / 255 - 0.485) / 0.229, abs=1e-4
    )  # red, ImageNet's mean and deviation
    with pytest.raises(UserError, match="a folder for each class"):
        ImageFolders(str(train / "a"), str(train))
