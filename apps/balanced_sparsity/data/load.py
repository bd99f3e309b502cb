"""From the configuration to data; what was loaded last is kept, for runs that follow one another in a process."""

from __future__ import annotations

from functools import lru_cache

from apps.balanced_sparsity.config import DataConfig
from apps.balanced_sparsity.data import images, speech, text
from apps.balanced_sparsity.data.image_folder import IMAGENET_HOW, ImageFolders
from apps.program.errors import UserError

Data = images.ImageData | ImageFolders | speech.SequenceData | speech.SpeakerData | text.TextData


@lru_cache(maxsize=3)
def load_data(config: DataConfig) -> Data:
    """The data set named; not to be changed by who gets it.

    Raises:
        UserError: it is missing (says how to get it) or not what it should be.
    """
    name, train, test = config.name, config.train, config.test
    if name == "digits":
        return images.digits()
    if name == "cifar10":
        return images.cifar10(_needed(train, images.CIFAR10_HOW), test)
    if name == "image_folder":
        if test is None:
            raise UserError(f"data.test names no folder. {IMAGENET_HOW}")
        return ImageFolders(_needed(train, IMAGENET_HOW), test, config.size, config.threads)
    if name == "digit_rows":
        return speech.digit_rows()
    if name == "spoken_digits":
        return speech.spoken_digits(_needed(train, speech.FSDD_HOW))
    if name == "timit_phones":
        return speech.timit_phones(_needed(train, speech.TIMIT_HOW))
    if name == "speakers":
        return speech.speakers(_needed(train, speech.TIMIT_HOW), config.more_speech)
    if name == "docstrings":
        return text.embedded(config.vocabulary, config.held_out, config.limit)
    return text.text_files(_needed(train, text.TEXT_HOW), test, config.vocabulary, config.held_out, config.limit)


def check_named(config: DataConfig) -> None:
    """That the paths are named that the data set needs, before anything is started for it. Raises UserError as ``load_data``."""
    how = {
        "cifar10": images.CIFAR10_HOW,
        "image_folder": IMAGENET_HOW,
        "spoken_digits": speech.FSDD_HOW,
        "timit_phones": speech.TIMIT_HOW,
        "speakers": speech.TIMIT_HOW,
        "text": text.TEXT_HOW,
    }.get(config.name)
    if how is not None:
        _needed(config.train, how)


def _needed(path: str | None, how: str) -> str:
    if path is None:
        raise UserError(f"data.train names no data. {how}")
    return path
