"""``BalancedWeight``: a weight with k entries in every block of B columns, packed; and pack, unpack, mask. Bit-exact.

Three layouts hold the same weight. ``rows`` is the canonical one, on disk: values [groups, blocks, k, vector], index uint8
[groups, bytes]. ``lanes`` is what the CPU kernels read: 16 rows side by side, values [rows / 16, tiles, j, 16].
``warps`` is what the GPU kernels read: 32 rows side by side, values [rows / 32, steps, 32, 16 bytes].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import functional as F

from kernels.balanced import index_codec, lanes, warps
from kernels.balanced.selection import cpp, magnitude_scores, select
from kernels.balanced.spec import INDEX_KINDS, TORCH_DTYPES, BalancedFormatError, BalancedSpec, Layout, ValueType

_INTERLEAVED = {"lanes": lanes, "warps": warps}
"""The layouts other than ``rows``: who converts them."""
_LIVE: WeakValueDictionary[int, BalancedWeight] = WeakValueDictionary()
"""Weights by the address of their values: a torch op is handed tensors, and finds what was derived from them before."""


@dataclass(frozen=True, eq=False)
class BalancedWeight:
    """A packed weight: ``spec`` says what it is, three tensors hold it (the same fields in both layouts).

    ``values``: ``spec.values_shape`` of the value type. ``index``: ``spec.index_shape``. ``scales``: float32 [rows] for int8
    (weight = value x scale of its row), else empty. Tensors may be replaced (``with_tensors``) and moved (``to``); values may be
    written in place, as an optimiser does (not through ``.data``, which torch does not notice); the index may not.
    """

    spec: BalancedSpec
    values: torch.Tensor
    index: torch.Tensor
    scales: torch.Tensor
    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What was computed from the tensors and is worth keeping; see ``derive``."""

    def __post_init__(self) -> None:
        spec = self.spec
        wanted = (
            ("values", self.values, spec.values_shape, TORCH_DTYPES[spec.value_type]),
            ("index", self.index, spec.index_shape, spec.index_dtype),
            ("scales", self.scales, (spec.scales_count,), torch.float32),
        )
        for name, tensor, shape, dtype in wanted:
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise BalancedFormatError(
                    f"{name} must be {dtype} {list(shape)} for {spec}, got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.values.device != self.index.device or self.values.device != self.scales.device:
            raise BalancedFormatError("values, index and scales must lie on one device")
        if not all(tensor.is_contiguous() for tensor in (self.values, self.index, self.scales)):
            raise BalancedFormatError("values, index and scales must be contiguous")
        if self.values.data_ptr():
            _LIVE[self.values.data_ptr()] = self

    def derive(self, name: Any, make: Callable[[], torch.Tensor | BalancedWeight], *, of_values: bool = True) -> Any:
        """``make()``, kept until the values are written to (``of_values``) or for ever (what depends on the index alone)."""
        version = (
            (self.values.data_ptr(), 0 if self.values.is_inference() else self.values._version) if of_values else None
        )
        found = self.derived.get(name)
        if found is not None and found[0] == version:
            return found[1]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self.derived[name] = (version, made)
        return made

    @property
    def rows(self) -> int:
        """Output features."""
        return self.spec.rows

    @property
    def columns(self) -> int:
        """Input features."""
        return self.spec.columns

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.values.nbytes + self.index.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, torch.Tensor]:
        """The three tensors by name, as buffers of a module or of a state dict."""
        return {"values": self.values, "index": self.index, "scales": self.scales}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> BalancedWeight:
        """The same spec over other tensors, checked."""
        return BalancedWeight(self.spec, tensors["values"], tensors["index"], tensors["scales"])

    def __deepcopy__(self, memo: dict[int, Any]) -> BalancedWeight:
        return self.with_tensors({name: copy.deepcopy(tensor, memo) for name, tensor in self.tensors().items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return BalancedWeight, (self.spec, self.values, self.index, self.scales)

    def clone(self) -> BalancedWeight:
        """A copy in memory of its own, of the kind that the kernels stream fastest."""
        with torch.inference_mode(False), torch.no_grad():
            return self.with_tensors(
                {
                    name: lanes.stream_memory(tensor.shape, tensor).copy_(tensor)
                    for name, tensor in self.tensors().items()
                }
            )

    def to(self, device: torch.device | str) -> BalancedWeight:
        """A copy on another device (itself where it lies there)."""
        if torch.device(device) == self.device:
            return self
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def to_layout(self, layout: Layout) -> BalancedWeight:
        """The same weight, bit for bit, in another layout, with the index kind that is smallest in it."""
        if layout == self.spec.layout:
            return self
        values = self.values.detach()
        if self.spec.layout != "rows":
            values, positions = _INTERLEAVED[self.spec.layout].to_rows(values, self.index, self.spec)
        else:
            positions = self.positions()
        return _assemble(self.spec, values, positions, self.scales, layout)

    def positions(self) -> torch.Tensor:
        """Kept positions within their block, ascending: uint8 [groups, blocks, k]. BalancedFormatError: a broken index."""
        return (
            self.derive("positions", self._positions, of_values=False)
            if self.spec.layout != "rows"
            else self._positions()
        )

    def _positions(self) -> torch.Tensor:
        if self.spec.layout == "rows":
            return index_codec.decode(self.index, self.spec)
        return _INTERLEAVED[self.spec.layout].to_rows(self.values.detach(), self.index, self.spec)[1]

    def validate(self) -> None:
        """Raises BalancedFormatError unless the index keeps exactly k columns of every block; for tensors from elsewhere."""
        self.positions()

    def unpack(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [rows, columns]: the packed values to the bit, zeros elsewhere.

        int8 gives float32 value x scale. ``dtype`` converts afterwards.
        """
        stored = self.unpack_values()
        if self.spec.value_type == "int8":
            stored = stored.float() * self.scales[:, None]
        return stored if dtype is None else stored.to(dtype)

    def unpack_values(self) -> torch.Tensor:
        """[rows, columns] of the value type, int8 without its scales."""
        spec = self.spec
        if spec.layout != "rows":
            if spec.layout == "lanes" and self.device.type == "cpu" and cpp():
                return torch.ops.sextant.balanced_unpack_lanes(
                    self.values.detach(),
                    self.index,
                    spec.rows,
                    spec.columns,
                    spec.tile,
                    INDEX_KINDS.index(spec.index_kind),
                )
            return self.to_layout("rows").unpack_values()
        shape = (spec.groups, spec.blocks, spec.block, spec.vector)
        dense = torch.zeros(shape, dtype=self.values.dtype, device=self.device)
        where = self.positions().long()[..., None].expand(self.values.shape)
        dense.scatter_(2, where, self.values.detach())
        by_row = dense.permute(0, 3, 1, 2).reshape(spec.groups * spec.vector, spec.blocks * spec.block)
        return by_row[: spec.rows, : spec.columns].contiguous()

    def mask(self) -> torch.Tensor:
        """Which entries are kept: bool [rows, columns], exactly k in every block that is not padded."""
        spec = self.spec
        mask = torch.zeros(spec.groups, spec.blocks, spec.block, dtype=torch.bool, device=self.device)
        mask.scatter_(2, self.positions().long(), True)
        by_row = mask.view(spec.groups, -1)[:, : spec.columns].repeat_interleave(spec.vector, dim=0)
        return by_row[: spec.rows].contiguous()

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """Entries of ``dense`` [rows, columns] at the kept places, in the shape of ``values``: the gradient of packed values."""
        spec = self.spec
        rows = _gather(dense, self.positions(), spec)
        return rows if spec.layout == "rows" else _INTERLEAVED[spec.layout].values_from_rows(rows, spec)


def weight_of(spec: BalancedSpec, values: torch.Tensor, index: torch.Tensor, scales: torch.Tensor) -> BalancedWeight:
    """The BalancedWeight over these tensors: the one that exists already, with what was derived from it, or a new one."""
    found = _LIVE.get(values.data_ptr())
    if (
        found is not None
        and found.spec == spec
        and found.values.data_ptr() == values.data_ptr()
        and found.index.data_ptr() == index.data_ptr()
        and (values.is_inference() or found.values.is_inference() or found.values._version == values._version)
    ):
        return found
    return BalancedWeight(spec, values, index, scales)


def pack(
    weight: torch.Tensor,
    k: int,
    block: int,
    *,
    value_type: ValueType = "fp32",
    vector: int = 1,
    scores: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    lossless: bool = False,
    layout: Layout | None = None,
) -> BalancedWeight:
    """Keep ``k`` entries of every ``block`` columns of ``weight`` [rows, columns] and pack them.

    Args:
        weight: any float dtype and device, not necessarily contiguous.
        value_type: what the values are stored as; int8 quantises with one scale a row.
        vector: so many consecutive rows share the choice.
        scores: what to choose by, [ceil(rows / vector), columns]; |weight| (summed over the rows of a vector) by default.
        mask: the choice itself, bool [rows, columns], as pruning made it; checked to keep exactly k in every block.
        lossless: refuse to drop an entry that is not zero.
        layout: "lanes" for the CPU kernels, "warps" for the GPU's; by default what the weight's device computes with.

    Raises:
        BalancedFormatError: a shape, k, block or mask that does not fit; values that the value type cannot hold.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise BalancedFormatError(f"a weight to pack must be a float matrix, got {weight.dtype} {tuple(weight.shape)}")
    if scores is not None and mask is not None:
        raise BalancedFormatError("give scores or a mask, not both")
    with torch.inference_mode(False), torch.no_grad():
        # Clones of inference tensors are ordinary ones: their version is counted, so that a change of values is noticed.
        weight = weight.clone() if weight.is_inference() else weight.detach()
        rows, columns = weight.shape
        spec = BalancedSpec(rows, columns, k, block, value_type, vector=vector).with_smallest_index("rows")
        if mask is not None:
            positions = _positions_of_mask(mask, spec)
        else:
            scores = magnitude_scores(weight, vector) if scores is None else scores.detach().to(weight.device)
            if tuple(scores.shape) != (spec.groups, columns):
                raise BalancedFormatError(f"scores must be [{spec.groups}, {columns}], got {list(scores.shape)}")
            positions = select(scores, k, block)
        stored, scales = _to_value_type(weight, positions, spec, lossless)
        return _assemble(spec, stored, positions, scales, layout or layout_of(weight.device))


def layout_of(device: torch.device | str) -> Layout:
    """The layout that the kernels of a device read."""
    layouts: dict[str, Layout] = {"cpu": "lanes", "cuda": "warps"}
    return layouts.get(torch.device(device).type, "rows")


def _assemble(
    spec: BalancedSpec, values: torch.Tensor, positions: torch.Tensor, scales: torch.Tensor, layout: Layout
) -> BalancedWeight:
    """A weight in ``layout`` from values [groups, blocks, k, vector] and positions [groups, blocks, k]."""
    spec = spec.with_smallest_index(layout)
    if layout != "rows":
        values, index = _INTERLEAVED[layout].from_rows(values, positions, spec)
        return BalancedWeight(spec, values, index, scales)
    return BalancedWeight(spec, values, index_codec.encode(positions, spec), scales)


def _positions_of_mask(mask: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    if mask.dtype != torch.bool or tuple(mask.shape) != (spec.rows, spec.columns):
        raise BalancedFormatError(
            f"a mask must be bool [{spec.rows}, {spec.columns}], got {mask.dtype} {list(mask.shape)}"
        )
    first = mask[:: spec.vector]
    shared = first.repeat_interleave(spec.vector, dim=0)[: spec.rows]
    if not torch.equal(shared, mask):
        raise BalancedFormatError(f"the mask differs within {spec.vector} rows that share their choice")
    counts = F.pad(first, (0, -spec.columns % spec.block)).view(spec.groups, spec.blocks, spec.block).sum(dim=2)
    wanted = torch.full((spec.blocks,), spec.k, device=mask.device)
    wanted[-1] = min(spec.k, spec.columns - (spec.blocks - 1) * spec.block)
    if bool((counts != wanted).any()):
        raise BalancedFormatError(f"the mask does not keep exactly {spec.k} of every {spec.block} columns")
    return select(first.float(), spec.k, spec.block)


def _gather(dense: torch.Tensor, positions: torch.Tensor, spec: BalancedSpec) -> torch.Tensor:
    """[rows, columns] at the kept places: [groups, blocks, k, vector], zeros where rows or columns are padded."""
    if spec.vector == 1 and dense.device.type == "cpu" and cpp():
        return torch.ops.sextant.balanced_gather(dense.detach().contiguous(), positions.contiguous(), spec.block)
    padded = F.pad(dense, (0, -spec.columns % spec.block, 0, -spec.rows % spec.vector))
    by_block = padded.view(spec.groups, spec.vector, spec.blocks, spec.block).permute(0, 2, 3, 1)
    where = positions.long()[..., None].expand(*positions.shape, spec.vector)
    return by_block.gather(2, where)


def _to_value_type(
    weight: torch.Tensor, positions: torch.Tensor, spec: BalancedSpec, lossless: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = _gather(weight, positions, spec)
    if lossless and int(kept.count_nonzero()) != int(weight.count_nonzero()):
        raise BalancedFormatError(
            f"{int(weight.count_nonzero()) - int(kept.count_nonzero())} entries that are not zero would be dropped: the weight "
            f"is not {spec.k}:{spec.block} sparse"
        )
    none = torch.empty(0, device=weight.device)
    if spec.value_type != "int8":
        stored = kept.to(TORCH_DTYPES[spec.value_type])
        if stored.dtype != kept.dtype and bool((stored.isinf() & ~kept.isinf()).any()):
            raise BalancedFormatError(
                f"values up to {float(kept.abs().nan_to_num().max()):.3g} do not fit into {spec.value_type}"
            )
        return stored, none
    if not bool(kept.isfinite().all()):
        raise BalancedFormatError("int8 values need finite weights; there are NaN or infinities")
    by_row = kept.float().permute(0, 3, 1, 2).reshape(spec.groups * spec.vector, -1)
    top = by_row.abs().amax(dim=1)
    scale = torch.where(top > 0, top / 127.0, torch.ones_like(top))
    # The scale of a row of subnormals may round to zero.
    scale = torch.where(scale > 0, scale, torch.full_like(scale, torch.finfo(torch.float32).tiny))
    by_group = scale.view(spec.groups, 1, 1, spec.vector)
    stored = torch.round(kept.float() / by_group).clamp(-127, 127).to(torch.int8)
    return stored, scale[: spec.rows].contiguous()
