"""Images held in memory: scikit-learn's digits (embedded), CIFAR-10 as Python batches or as images in a folder a class.

``ImageData`` keeps pixels as uint8; batches are normalised, and where asked shifted and mirrored, as they are drawn.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from apps.balanced_sparsity.data.files import read_files
from apps.program.errors import UserError

DIGITS_HELD_OUT = 297
"""The last of scikit-learn's 1,797 digits, of other writers, are only evaluated."""
CIFAR10_HOW = (
    "Get CIFAR-10's Python version (cifar-10-python.tar.gz, https://www.cs.toronto.edu/~kriz/cifar.html), unpack it and name the "
    "folder cifar-10-batches-py in data.train; or name folders (or tar archives) of images, a folder a class, in data.train and "
    "data.test."
)
_CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))


@dataclass(frozen=True)
class Images:
    """Pixels uint8 [N, C, H, W] and labels int64 [N]."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Images:
        """The first ``count``; all of them for None."""
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class ImageData:
    """A data set for classification: what is trained on and what is only evaluated; class names by label."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        # Of the channels, over what is trained on.
        sample = self.train.pixels[:10_000].float() / 255
        mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp(min=1e-3)
        object.__setattr__(self, "_mean", mean[:, None, None])
        object.__setattr__(self, "_std", std[:, None, None])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.pixels.shape[1:]
        return int(channels), int(height), int(width)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [N, C, H, W] with mean 0 and deviation 1 of each channel over the training images."""
        return (pixels.float() / 255 - self._mean) / self._std  # type: ignore[attr-defined]


def shift_and_mirror(pixels: torch.Tensor, pad: int, generator: torch.Generator) -> torch.Tensor:
    """Each image [N, C, H, W] moved by up to ``pad`` pixels (zeros come in) and mirrored left to right half of the time."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (pad, pad, pad, pad))
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    rows = tops[:, None] + torch.arange(height)
    columns = lefts[:, None] + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def digits() -> ImageData:
    """scikit-learn's handwritten digits, [1, 8, 8] in 0 to 255; nothing to download."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images * 255 / 16, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    cut = len(labels) - DIGITS_HELD_OUT
    return ImageData(
        Images(pixels[:cut], labels[:cut]), Images(pixels[cut:], labels[cut:]), tuple(str(digit) for digit in range(10))
    )


def cifar10(train: str, test: str | None) -> ImageData:
    """CIFAR-10 from its Python batches (one folder), or from images in a folder a class (two folders or archives).

    Raises:
        UserError: data is missing or not what it should be; says how to get it.
    """
    path = Path(train).expanduser()
    if (path / "data_batch_1").exists():
        return _python_batches(path)
    if test is None:
        raise UserError(f"{path} holds no data_batch_1, and data.test names no images. {CIFAR10_HOW}")
    return class_images(train, test, CIFAR10_HOW)


def class_images(train: str, test: str, how_to_get: str) -> ImageData:
    """Small images of one size, ``.../<class>/<name>.jpg|png``, all read into memory. Raises UserError as ``cifar10``."""
    read = {}
    for part, path in (("train", train), ("test", test)):
        names, images = [], []
        for name, data in read_files(path, (".jpg", ".jpeg", ".png"), how_to_get):
            names.append(name.parent.name)
            images.append(decode(data, f"{path}: {name}"))
        if len({image.shape for image in images}) > 1:
            raise UserError(
                f"The images of {path} have different sizes; data.name=image_folder reads such ones and crops them."
            )
        read[part] = (names, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())
    classes = sorted(set(read["train"][0]))
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(read["test"][0]) - set(classes))
    if unknown:
        raise UserError(f"{test} has the class {unknown[0]!r}, which {train} has not.")
    parts = [
        Images(pixels, torch.tensor([numbers[name] for name in names], dtype=torch.int64))
        for names, pixels in (read["train"], read["test"])
    ]
    if parts[0].pixels.shape[1:] != parts[1].pixels.shape[1:]:
        raise UserError(f"The images of {train} and of {test} have different sizes.")
    # Files come sorted by class: a part of the first ones must hold all classes.
    return ImageData(_shuffled(parts[0]), _shuffled(parts[1]), tuple(classes))


def decode(data: bytes, what: str) -> Any:
    """An image file as uint8 [H, W, 3], red first. Raises UserError for what is none."""
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{what} is no image that can be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _shuffled(images: Images) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Images(images.pixels[order], images.labels[order])


def _python_batches(folder: Path) -> ImageData:
    def part(names: tuple[str, ...]) -> Images:
        batches = [_unpickle(folder / name) for name in names]
        try:
            pixels = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches])
            labels = torch.tensor([label for batch in batches for label in batch[b"labels"]], dtype=torch.int64)
            images = torch.from_numpy(pixels.reshape(len(labels), 3, 32, 32))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"The batches in {folder} do not hold CIFAR-10's data and labels ({error}). {CIFAR10_HOW}"
            ) from error
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            raise UserError(f"The labels in {folder} are not 0 to 9.")
        return Images(images, labels)

    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return ImageData(part(_CIFAR_TRAIN), part(("test_batch",)), names)


class _ArraysOnly(pickle.Unpickler):
    """The batches are Python 2 pickles of dicts, lists and numpy arrays; nothing else is made from them."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to make a {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. {CIFAR10_HOW}") from error
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{path} is no batch of CIFAR-10's Python version: {error}.") from error
    if not isinstance(batch, dict):
        raise UserError(f"{path} is no batch of CIFAR-10's Python version.")
    return batch
