"""ImageNet-style folders: a folder a class, large images of any size, decoded and cropped as they are drawn.

Training crops are drawn from (seed, epoch, index) alone, so that a resumed run sees the same pixels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.balanced_sparsity.data.images import decode
from apps.program.errors import UserError
from apps.training.position import mix

IMAGENET_HOW = (
    "ImageNet is had from https://www.image-net.org (ILSVRC 2012); unpack it to a folder of classes for training and one for "
    "validation, and name them in data.train and data.test."
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training pixels, by channel; what VGG and its successors were trained with."""
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class FolderPart:
    """Paths of images and their labels."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)


class ImageFolders:
    """``train`` and ``test`` folders of the same classes.

    Args:
        size: pixels of a side of the crops.
        threads: decoders (OpenCV lets go of the interpreter lock).

    Raises:
        UserError: a folder is missing, has no images, or the test folder has classes of its own.
    """

    def __init__(self, train: str, test: str, size: int = 224, threads: int = 4):
        self.size, self.threads = size, threads
        self.classes = _classes(Path(train).expanduser())
        self.train = _part(Path(train).expanduser(), self.classes)
        self.test = _part(Path(test).expanduser(), self.classes)

    def training_batch(self, indices: torch.Tensor, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(images float32 [N, 3, size, size], labels [N]): a random crop of 8 to 100 % of the area, mirrored half of the time."""

        def one(index: int) -> Any:
            random = np.random.default_rng(mix(seed, epoch, index))
            return _random_crop(self._read(self.train.paths[index]), self.size, random)

        return self._batch([int(index) for index in indices], one), torch.tensor(
            [self.train.labels[int(index)] for index in indices]
        )

    def test_batch(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``first`` to ``last`` (not included) of the test folder: the shorter side at 8/7 of the crop, its centre."""

        def one(index: int) -> Any:
            return _centre_crop(self._read(self.test.paths[index]), self.size)

        return self._batch(list(range(first, last)), one), torch.tensor(self.test.labels[first:last])

    def _batch(self, indices: list[int], one: Any) -> torch.Tensor:
        with ThreadPoolExecutor(self.threads) as pool:
            pixels = torch.from_numpy(np.stack(list(pool.map(one, indices)))).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (pixels.float() / 255 - mean) / std

    @staticmethod
    def _read(path: str) -> Any:
        try:
            return decode(Path(path).read_bytes(), path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise UserError(f"There is no folder of images {folder}. {IMAGENET_HOW}")
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if len(classes) < 2:
        raise UserError(f"{folder} does not hold a folder for each class. {IMAGENET_HOW}")
    return classes


def _part(folder: Path, classes: tuple[str, ...]) -> FolderPart:
    own = _classes(folder)
    if unknown := sorted(set(own) - set(classes)):
        raise UserError(f"{folder} has the class {unknown[0]!r}, which the training folder has not.")
    found = [
        (str(path), number)
        for number, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(f"{folder} holds no {', '.join(SUFFIXES)} images. {IMAGENET_HOW}")
    return FolderPart(tuple(path for path, _ in found), tuple(label for _, label in found))


def _random_crop(image: Any, size: int, random: np.random.Generator) -> Any:
    """Area 8 to 100 %, sides 3:4 to 4:3 (Szegedy et al., 2015), resized to ``size``."""
    import cv2

    height, width = image.shape[:2]
    top, left, tall, wide = 0, 0, height, width
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1.0)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        one_wide, one_tall = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < one_wide <= width and 0 < one_tall <= height:
            top, left = int(random.integers(height - one_tall + 1)), int(random.integers(width - one_wide + 1))
            tall, wide = one_tall, one_wide
            break
    crop = cv2.resize(image[top : top + tall, left : left + wide], (size, size), interpolation=cv2.INTER_LINEAR)
    return crop[:, ::-1].copy() if random.random() < 0.5 else crop


def _centre_crop(image: Any, size: int) -> Any:
    import cv2

    height, width = image.shape[:2]
    scale = size * 8 / 7 / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    image = cv2.resize(image, (wide, tall), interpolation=cv2.INTER_LINEAR)
    top, left = (tall - size) // 2, (wide - size) // 2
    return image[top : top + size, left : left + size]
