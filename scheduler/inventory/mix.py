"""What is asked lately, learned one request at a time: the classes behind expected fragmentation.

Invariant: learned only from requests that came; a class weighs half as much after each half-life, and the lightest
classes are forgotten first, so this never grows beyond `CLASSES_MAX`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from policies.columns import FloatArray, Kind, Mix
from scheduler.model.pod import Request

from .asks import Asks

CLASSES_MAX = 256
LEARN_EVERY = 32
PRICE_MOVED = 0.05
MOVED = 0.02  # part of the weight that has to change hands before what was judged by a mix is judged anew


@dataclass(frozen=True, slots=True)
class _Class:
    kind: Kind
    count: int
    cpu_milli: int
    milli: int
    mib: int
    profile: str
    models: tuple[str, ...]


@dataclass(slots=True)
class Arrivals:
    """Counts classes of requests with decay, and tells them as a Mix.

    Attributes:
        half_life_s: after this long a request counts half.
    """

    asks: Asks
    half_life_s: float = 86_400.0
    _weights: dict[_Class, tuple[float, int]] = field(default_factory=dict)  # weight at a time in microseconds
    _mix: Mix | None = None
    _told: dict[_Class, float] = field(default_factory=dict)  # weights in the present mix
    _since: int = 0
    _models: int = 0
    _layout: int = -1

    def learn(self, request: Request, now_us: int) -> None:
        """Count one request that was submitted."""
        devices = request.devices
        seen = _Class(
            devices.kind,
            devices.count,
            request.amounts.cpu_milli,
            devices.milli or (1000 if devices.kind is Kind.WHOLE else 0),
            devices.memory_mib,
            devices.profile,
            devices.models,
        )
        self._weights[seen] = (self._weight(seen, now_us) + 1.0, now_us)
        if len(self._weights) > CLASSES_MAX:
            del self._weights[min(self._weights, key=lambda known: self._weight(known, now_us))]
        self._since += 1

    def mix(self, now_us: int) -> Mix:
        """Return the present mix; it stays the same object until its weights have moved or a GPU model appears.

        Whether they have moved is looked at after every 32 requests.
        """
        columns = self.asks.registry.columns
        if self._since >= LEARN_EVERY:
            self._since = 0
            if self._moved(now_us):
                self._mix = None
        if self._layout != columns.layout and self._mix is not None:
            self._layout = columns.layout
            if len(columns.models) != self._models or self._dearer(self._mix):
                self._mix = None
        if self._mix is None:
            self._mix, self._models, self._since = self._made(now_us), len(columns.models), 0
            self._layout = columns.layout
        return self._mix

    def _dearer(self, mix: Mix) -> bool:
        """Say whether nodes have come or gone that change what a model is worth."""
        return bool(np.abs(self._prices(mix) - mix.price).max(initial=0.0) > PRICE_MOVED)

    def _prices(self, mix: Mix) -> FloatArray:
        """Return ``[M]`` how much of each model is asked by requests bound to some models: 1 = all that there is of it.

        As if all requests together asked for just what the cluster has. A request for one of several models counts
        for each by how many GPUs there are of it.
        """
        snapshot = self.asks.registry.snapshot()
        stock = np.bincount(snapshot.model[snapshot.exists], minlength=mix.models.shape[1]).astype(np.float64)
        size = np.where(mix.kind == Kind.SHARE, np.where(mix.device_milli > 0, mix.device_milli / 1000, 1.0), 1.0)
        gpus = np.where((mix.kind == Kind.WHOLE) | (mix.kind == Kind.SHARE), mix.count * size, 0.0) * mix.weight
        allowed = mix.models * stock
        parts = allowed / np.maximum(allowed.sum(axis=1, keepdims=True), 1.0)
        bound = (gpus * ~mix.models.all(axis=1)) @ parts
        scale = stock.sum() / max(float(gpus.sum()), 1e-9)
        return np.asarray(np.where(stock > 0, bound * scale / np.maximum(stock, 1.0), 0.0), np.float32)

    def _moved(self, now_us: int) -> bool:
        weights = self._parts(now_us)
        classes = self._told.keys() | weights.keys()
        return sum(abs(weights.get(each, 0.0) - self._told.get(each, 0.0)) for each in classes) > 2 * MOVED

    def _parts(self, now_us: int) -> dict[_Class, float]:
        """Return each class's part of the whole weight; they sum to 1 once anything was seen."""
        weights = {each: self._weight(each, now_us) for each in self._weights}
        total = sum(weights.values())
        return {each: weight / total if total else 0.0 for each, weight in weights.items()}

    def _weight(self, known: _Class, now_us: int) -> float:
        weight, at_us = self._weights.get(known, (0.0, now_us))
        return float(weight * 0.5 ** ((now_us - at_us) / (self.half_life_s * 1_000_000)))

    def _made(self, now_us: int) -> Mix:
        self._told = self._parts(now_us)
        known = list(self._told)
        models = len(self.asks.registry.columns.models)
        slices: dict[str, float] = {}
        for each, part in self._told.items():
            if each.kind is Kind.MIG:
                slices[each.profile] = slices.get(each.profile, 0.0) + part * each.count
        if slices:
            self.asks.weigh(slices)
        mix = Mix(
            kind=np.asarray([each.kind for each in known], np.uint8),
            count=np.asarray([each.count for each in known], np.int32),
            cpu_milli=np.asarray([each.cpu_milli for each in known], np.int64),
            device_milli=np.asarray([each.milli for each in known], np.int32),
            device_mib=np.asarray([each.mib for each in known], np.int32),
            profile=np.asarray([self.asks.registry.columns.profiles.find(each.profile) for each in known], np.int32),
            models=np.asarray([self.asks.models(each.models) for each in known], np.bool_).reshape(-1, models),
            weight=np.asarray(list(self._told.values()), np.float32),
            price=np.zeros(models, np.float32),
        )
        return replace(mix, price=self._prices(mix))
