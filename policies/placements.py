"""Where MIG instances may lie on a GPU, as tables with one row per state a GPU can be in.

A state is what is taken of a GPU: memory slices and media engines, for the slices alone do not tell what fits next.
Row 0 is a GPU that takes no instance at all. Invariant: two placements of one profile never overlap, so that any of
them leaves room for all the others but one; and every table is made anew from plain data, never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt

FREE_WEIGHT = 0.3  # of the free slices beside the expected loss: fill GPUs that are begun
COST_SPAN = (-1.0, 1.0 + FREE_WEIGHT)
NEAREST_MAX = 3
_NAME = re.compile(r"([0-9]+)g\.([0-9]+)gb(.*)")


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of instance: memory slices it takes, where it may start, and what of each media engine it takes."""

    size: int
    starts: tuple[int, ...]
    engines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """GPUs of one geometry: memory slices, the step of all starts and sizes, media engines, shapes by name."""

    slices: int
    granule: int
    engines: tuple[int, ...]
    shapes: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Model:
    """One GPU model: its family, and which shape a profile name means on it."""

    family: str
    profiles: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """What GPUs in each of R states take of one profile, and where the next instance goes best.

    Attributes:
        fits: ``[R]`` how many more instances fit, all at once.
        worth: ``[R]`` 0..1, how good it is to place one there; 0 where none fits.
        start: ``[R]`` best first memory slice, -1 where none fits.
        sizes: ``[R]`` memory slices of one instance, 0 where the model has no such profile.
        after: ``[R]`` row of the state after that.
        slots: ``[M]`` by model code, how many fit on an empty GPU; 0 = the model has no such profile.
    """

    fits: npt.NDArray[np.uint8]
    worth: npt.NDArray[np.float32]
    start: npt.NDArray[np.int8]
    sizes: npt.NDArray[np.int8]
    after: npt.NDArray[np.uint16]
    slots: npt.NDArray[np.uint8]


def no_offer(rows: int, models: int) -> Offer:
    """Return the offer for a profile that nobody has."""
    return Offer(
        np.zeros(rows, np.uint8),
        np.zeros(rows, np.float32),
        np.full(rows, -1, np.int8),
        np.zeros(rows, np.int8),
        np.zeros(rows, np.uint16),
        np.zeros(models, np.uint8),
    )


class States:
    """Every state of one family: which instances fit in it, and which state each of their placements leads to.

    State = taken granules x engines used, as one number: granules, then a digit per engine.
    """

    def __init__(self, family: Family) -> None:
        """Make the tables.

        Raises:
            ValueError: placements of one shape overlap, or do not follow the granule.
        """
        self.family = family
        self._digits = tuple(count + 1 for count in family.engines)
        self._engine_states = int(np.prod(self._digits, dtype=np.int64))
        self.count = (1 << family.slices // family.granule) * self._engine_states
        state = np.arange(self.count)
        self._granules = state // self._engine_states
        self.free = family.slices - np.bitwise_count(self._granules) * family.granule
        self._left = [room - state // self._stride(engine) % (room + 1) for engine, room in enumerate(family.engines)]
        self.fits: dict[str, npt.NDArray[np.int64]] = {}
        self.after: dict[str, npt.NDArray[np.int64]] = {}  # [states, starts], -1 where it does not fit
        for name, shape in family.shapes.items():
            self._add(name, shape)

    def _stride(self, engine: int) -> int:
        return int(np.prod(self._digits[engine + 1 :], dtype=np.int64))

    def _add(self, name: str, shape: Shape) -> None:
        bits = [self._bits(range(start, start + shape.size)) for start in shape.starts]
        if any(start % self.family.granule for start in (shape.size, *shape.starts)):
            raise ValueError(f"shape {name}: starts and size must be multiples of {self.family.granule}")
        if any(one & other for one, other in combinations(bits, 2)):
            raise ValueError(f"shape {name}: placements overlap")
        free = (self._granules[:, None] & np.asarray(bits)) == 0
        fits = free.sum(axis=1)
        taken = 0
        for engine, need in enumerate(shape.engines):
            if need:
                fits = np.minimum(fits, self._left[engine] // need)
            taken += need * self._stride(engine)
        after = (np.arange(self.count) + taken)[:, None] + np.asarray(bits) * self._engine_states
        self.fits[name], self.after[name] = fits, np.where(free & (fits > 0)[:, None], after, -1)

    def _bits(self, slices: Iterable[int]) -> int:
        return sum({1 << taken // self.family.granule for taken in slices})

    def state(self, occupancy: int, engines: Sequence[int]) -> int:
        """Return the state in which these memory slices (bits) and engines are taken; what is too much is all."""
        taken = (index for index in range(self.family.slices) if occupancy >> index & 1)
        used = sum(
            min(n, room) * self._stride(i) for i, (n, room) in enumerate(zip(engines, self.family.engines, strict=True))
        )
        return self._bits(taken) * self._engine_states + used

    def losses(self, weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
        """Return the expected loss of each state: the share of the GPU that is free and of no use to the next ask.

        Args:
            weights: how likely each shape is asked next; nothing above 0 = all alike.
        """
        total = sum(weights.values())
        loss = np.zeros(self.count)
        for name, shape in self.family.shapes.items():
            weight = weights.get(name, 0.0) / total if total > 0 else 1 / len(self.family.shapes)
            loss += weight * (self.free - shape.size * self.fits[name])
        return np.round(loss / self.family.slices, 9)  # equal states are equal, whatever the order of the sum


class Placements:
    """The tables of every model, side by side: each model has its own rows, since a name means a shape only there."""

    def __init__(
        self,
        families: Mapping[str, States],
        models: Mapping[str, Model],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Lay the states of every model's family side by side; `weights` says how often each profile name is asked.

        Without weights, all shapes are alike.
        """
        self.families, self.models = dict(families), dict(models)
        self.rows = 1
        self._first: dict[str, int] = {}
        self._losses: dict[str, npt.NDArray[np.float64]] = {}
        for name, model in models.items():
            states = families[model.family]
            self._first[name] = self.rows
            self.rows += states.count
            wanted = dict.fromkeys(model.profiles.values(), 0.0)
            for profile, shape in model.profiles.items():
                wanted[shape] += (weights or {}).get(profile, 0.0)
            self._losses[name] = states.losses(wanted)

    def weighed(self, weights: Mapping[str, float]) -> Placements:
        """Return the same states and rows for another mix of asks."""
        return Placements(self.families, self.models, weights)

    def family(self, model: str) -> int:
        """Return the code of a model's family, -1 for a model without MIG."""
        known = self.models.get(model)
        return -1 if known is None else list(self.families).index(known.family)

    def shape(self, model: str, profile: str) -> Shape | None:
        """Return what a profile name means on a model; None where the model has no such profile."""
        known = self.models.get(model)
        if known is None or profile not in known.profiles:
            return None
        return self.families[known.family].family.shapes[known.profiles[profile]]

    def slices(self, model: str) -> int:
        """Return how many memory slices a model has, 0 for a model without MIG."""
        known = self.models.get(model)
        return 0 if known is None else self.families[known.family].family.slices

    def engines(self, model: str) -> tuple[int, ...]:
        """Return a model's media engines by kind; empty for a model without MIG."""
        known = self.models.get(model)
        return () if known is None else self.families[known.family].family.engines

    def row(self, model: str, occupancy: int, engines: Sequence[int]) -> int:
        """Return the row of a GPU on which these memory slices (bits) and media engines are taken.

        Args:
            model: key of the geometry table; one without MIG has row 0.
            occupancy: taken memory slices; bits beyond the model's slices mean nothing.
            engines: how many of each kind are used, in the order of `engines`.
        """
        known = self.models.get(model)
        return 0 if known is None else self._first[model] + self.families[known.family].state(occupancy, engines)

    def offer(self, profile: str, models: Sequence[str]) -> Offer:
        """Return where instances of a profile fit.

        Args:
            profile: profile name, such as `1g.10gb`.
            models: model key by model code.
        """
        offer = self._made(profile)
        slots = [self._empty(offer, model) for model in models]
        return replace(offer, slots=np.asarray(slots, np.uint8))

    def _empty(self, offer: Offer, model: str) -> int:
        return int(offer.fits[self._first[model]]) if model in self._first else 0

    def _made(self, profile: str) -> Offer:
        offer = no_offer(self.rows, 0)
        for name, model in self.models.items():
            shape = self.shape(name, profile)
            if shape is None:
                continue
            states, loss, first = self.families[model.family], self._losses[name], self._first[name]
            here, kind = slice(first, first + states.count), model.profiles[profile]
            after = states.after[kind]
            choice = np.where(after < 0, np.inf, loss.take(after)).argmin(axis=1)[:, None]
            then = np.take_along_axis(after, choice, axis=1)[:, 0]
            cost = loss.take(then) - loss + FREE_WEIGHT * states.free / states.family.slices
            fits = then >= 0
            low, high = COST_SPAN
            offer.fits[here] = states.fits[kind]
            offer.worth[here] = np.where(fits, (high - cost) / (high - low), 0)
            offer.start[here] = np.where(fits, np.asarray(shape.starts)[choice[:, 0]], -1)
            offer.sizes[here] = shape.size
            offer.after[here] = np.where(fits, then + first, 0)
        return offer

    def nearest(self, profile: str, models: Iterable[str]) -> tuple[str, ...]:
        """Return up to three profile names that these models have, those most like `profile` first.

        Likeness goes by compute slices, then memory, then what follows (`+me`).
        """
        legal = {name for model in models if model in self.models for name in self.models[model].profiles}
        wanted = _NAME.fullmatch(profile)
        compute, memory, rest = (int(wanted[1]), int(wanted[2]), wanted[3]) if wanted else (0, 0, "")

        def distance(name: str) -> tuple[int, int, bool, str]:
            found = _NAME.fullmatch(name)
            assert found is not None, f"the geometry table calls a profile {name!r}"
            return abs(int(found[1]) - compute), abs(int(found[2]) - memory), found[3] != rest, name

        return tuple(sorted(legal, key=distance)[:NEAREST_MAX])


NO_OFFER = no_offer(1, 1)
NO_PLACEMENTS = Placements({}, {})
"""Where no model has MIG."""
