"""Which partitions a sweep needs: few layouts that together offer every profile, and trials in the order of their layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from actors.mig.backends import SliceBackend
from apps.migperf.sweep.trial import FULL, TrialPoint

Layout = tuple[str, ...]
Fits = Callable[[Sequence[str]], bool]


def cover(profiles: Sequence[str], fits: Fits) -> tuple[Layout, ...]:
    """Layouts so that each profile is in one of them: first fit, the largest first; () for the baseline without slices.

    ``profiles``: the smallest first, as a backend lists them.
    """
    layouts: list[list[str]] = []
    for profile in [name for name in reversed(profiles) if name != FULL]:
        for layout in layouts:
            if fits([*layout, profile]):
                layout.append(profile)
                break
        else:
            layouts.append([profile])
    found = [tuple(layout) for layout in layouts]
    return tuple(([()] if FULL in profiles else []) + found)


def corun_layout(profile: str, backend: SliceBackend) -> Layout:
    """As many slices of one profile as fit."""
    if profile == FULL:
        return ()
    most = next(known.most for known in backend.profiles() if known.name == profile)
    while most > 1 and not backend.fits([profile] * most):
        most -= 1
    return (profile,) * most


def group(points: Sequence[TrialPoint], backend: SliceBackend) -> list[tuple[Layout, tuple[TrialPoint, ...]]]:
    """Points by layout, in the order in which the layouts are cut: one re-partition a group.

    Solo points share layouts (idle neighbours change nothing but are there); co-run points get a layout of their profile.
    """
    known = [profile.name for profile in backend.profiles()]
    solo = [point for point in points if not point.corun]
    wanted = {point.profile for point in solo}
    groups: dict[Layout, list[TrialPoint]] = {}
    layouts = cover([name for name in (FULL, *known) if name in wanted], backend.fits)
    for layout in layouts:
        for point in solo:
            if point.profile in layout or (point.profile == FULL and not layout):
                groups.setdefault(layout, []).append(point)
    for point in points:
        if point.corun:
            groups.setdefault(corun_layout(point.profile, backend), []).append(point)
    return [(layout, tuple(members)) for layout, members in groups.items()]


def repartitions(order: Sequence[Layout], held: Layout = ()) -> int:
    """How often the device is cut anew when layouts are wanted in this order."""
    count = 0
    for layout in order:
        if sorted(layout) != sorted(held):
            count, held = count + 1, layout
    return count
