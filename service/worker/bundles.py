"""The bundles of a worker: which are loaded, what each takes, and which has to go when another comes.

With a budget (`GIANTLEAP_BUNDLE_MEMORY_BYTES`) those used last stay, by their measured size. One is loaded at a time,
after room was made for it, so that the budget holds at every moment. `giantleap.service.worker.loading` decides when.
"""

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch

from giantleap.models.allocator import return_freed_memory
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.device import free_cache
from giantleap.models.live_storage import tensor_bytes
from giantleap.models.route import Route
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

OpenRoute = Callable[[Bundle], Route]


class BundleCache:
    """The bundles of one worker.

    Args:
        bundles: All that it serves, by name.
        open_route: Loads one.
        device: Where they go.
        budget_bytes: Most bytes of loaded bundles; None keeps all.
        metrics: Where loads are counted.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        open_route: OpenRoute,
        device: torch.device,
        budget_bytes: int | None,
        metrics: Metrics,
    ) -> None:
        self.bundles = bundles
        self.grids: dict[str, LatentGrid] = {}
        self.sizes_bytes: dict[str, int] = {}
        self._open_route = open_route
        self._device = device
        self._budget_bytes = budget_bytes
        self._decode_budget_bytes: int | None = None
        self._metrics = metrics
        self._routes: OrderedDict[str, Route] = OrderedDict()  # the least recently used first

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the loaded bundles."""
        return tuple(self._routes)

    @property
    def holds_all(self) -> bool:
        """Whether every bundle is loaded."""
        return len(self._routes) == len(self.bundles)

    @property
    def reserved_bytes(self) -> int:
        """What the loaded bundles take at most, once all were measured."""
        total_bytes = sum(self.sizes_bytes.values())
        return total_bytes if self._budget_bytes is None else min(total_bytes, self._budget_bytes)

    def use(self, name: str) -> Route:
        """A loaded bundle, which becomes the last to go."""
        self._routes.move_to_end(name)
        return self._routes[name]

    def measure(self, name: str, warm: Callable[[Route], object]) -> Route:
        """Load a bundle for the first time, alone where there is a budget, and measure it once it is warm.

        Raises:
            BadConfiguration: It takes more than the budget.
        """
        if self._budget_bytes is not None:
            self._evict_until(0)
        before_bytes = _held_bytes(self._device)
        route = self.load(name)
        warm(route)
        size_bytes = max(0, _held_bytes(self._device) - before_bytes)
        if self._budget_bytes is not None and size_bytes > self._budget_bytes:
            raise BadConfiguration(
                f"bundle {name} takes {size_bytes} bytes once loaded, and bundle_memory_bytes allows "
                f"{self._budget_bytes}: raise it, or serve the bundle elsewhere"
            )
        self.grids[name] = LatentGrid(self.bundles[name].latent_space.stride_px, route.window)
        self.sizes_bytes[name] = size_bytes
        self._metrics.set_bundle_size(name, size_bytes)
        return route

    def make_room(self, name: str) -> None:
        """Evict the bundles used longest ago until one more fits."""
        if self._budget_bytes is not None:
            self._evict_until(self._budget_bytes - self.sizes_bytes[name])

    def load(self, name: str) -> Route:
        """Load a bundle that is not loaded; the room for it is there (`make_room`).

        Raises:
            Exception: Whatever keeps it from being loaded; then nothing of it stays.
        """
        started_s = time.monotonic()
        route = self._open_route(self.bundles[name])
        route.vae.budget_bytes = self._decode_budget_bytes
        route.vae.on_decode = partial(self._metrics.count_decoded, name)
        self._routes[name] = route
        load_s = time.monotonic() - started_s
        self._metrics.observe_load(name, load_s)
        log.info("bundle loaded", extra={"fields": {"bundle": name, "load_s": round(load_s, 3)}})
        return route

    def give_decode_budget(self, budget_bytes: int) -> None:
        """Let decodes use the memory that the loaded bundles leave; without it they plan with what is free."""
        self._decode_budget_bytes = budget_bytes
        for route in self._routes.values():
            route.vae.budget_bytes = budget_bytes

    def free(self) -> None:
        """Return what no loaded bundle uses to the device and the system."""
        free_cache(self._device)
        return_freed_memory()

    def _evict_until(self, budget_bytes: int) -> None:
        """Evict the bundles used longest ago until the others take no more than this."""
        evicted = False
        while self._routes and sum(self.sizes_bytes[name] for name in self._routes) > budget_bytes:
            name, _ = self._routes.popitem(last=False)
            self._metrics.count_eviction(name)
            log.info("bundle evicted", extra={"fields": {"bundle": name, "size_bytes": self.sizes_bytes[name]}})
            evicted = True
        if evicted:
            self.free()


def _held_bytes(device: torch.device) -> int:
    """Bytes that tensors hold now: of torch's allocator on a GPU, of the tensors that Python knows on a CPU."""
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device)
    return tensor_bytes()
