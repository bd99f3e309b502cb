"""A workload ready to run: a model of the catalogue with its input, one call for an inference or a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.migperf.workloads.resnet import ResNet
from apps.migperf.workloads.shapes import Shape
from apps.migperf.workloads.transformer import Decoder, Encoder, LstmModel, VisionTransformer

Mode = Literal["infer", "train"]
DEFAULT_SEQUENCE = 64


class Workload:
    """One model on one device. ``step`` runs a batch and waits for the device."""

    def __init__(
        self,
        shape: Shape,
        mode: Mode,
        batch: int,
        sequence: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        """``batch``: pictures or sequences a step. ``sequence``: tokens (context, when decoding); ignored by pictures.

        Raises:
            torch.OutOfMemoryError, RuntimeError: it does not fit (see ``is_out_of_memory``).
        """
        torch.manual_seed(seed)
        self.shape, self.mode, self.batch = shape, mode, batch
        self.sequence = (sequence or DEFAULT_SEQUENCE) if shape.has_sequence else None
        self.device = torch.device(device)
        self.model = make_model(shape, self.sequence or 1).to(self.device, dtype)
        self._input, self._target = self._batch(dtype)
        if mode == "train":
            self.model.train()
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
            self._run: Callable[[], Tensor] = self._train
        else:
            self.model.eval()
            self._run = self._decode if shape.family == "decoder" else self._infer
            if shape.family == "decoder":
                self._cache = self.model.new_cache(batch, self.sequence, next(self.model.parameters()))
                self._input = self._input[:, :1]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> float:
        """One batch; returns the loss (training) or the sum of the output (so that nothing can be left out)."""
        value = float(self._run())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return value

    def memory_mib(self) -> float:
        """Peak of memory: the CUDA allocator's, or on a CPU the peak resident set of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    @torch.inference_mode()
    def _infer(self) -> Tensor:
        return self.model(self._input).sum()

    @torch.inference_mode()
    def _decode(self) -> Tensor:
        return self.model.decode(self._input, self._cache).sum()

    def _train(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        logits = self.model(self._input)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), self._target.flatten())
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _batch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape, batch = self.shape, self.batch
        if shape.picture:
            given = torch.randn(batch, 3, shape.picture, shape.picture, device=self.device, dtype=dtype)
            return given, torch.randint(shape.classes, (batch,), device=self.device)
        ids = torch.randint(shape.vocabulary, (batch, self.sequence or 1), device=self.device)
        classes = torch.randint(shape.classes or 1, (batch,), device=self.device)
        return ids, classes if shape.family == "encoder" else ids.roll(-1, 1)  # language models learn the next token


def make_model(shape: Shape, sequence: int) -> nn.Module:
    """The untrained model of a shape."""
    if shape.family == "resnet":
        return ResNet(shape)
    if shape.family == "vit":
        return VisionTransformer(shape)
    if shape.family == "lstm":
        return LstmModel(shape)
    return Decoder(shape) if shape.family == "decoder" else Encoder(shape, max(512, sequence))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch (or Python) says that memory ran out, on a GPU or under a slice's limit on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(
        words in text
        for words in ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "std::bad_alloc",
                      "resource temporarily unavailable", "alloc_failed")
    )  # fmt: skip
