"""Adapters (LoRA) on one loaded pipeline: loaded on demand, kept in an LRU, active for the call that names them alone.

An adapter that is not active adds nothing to a layer: the layer runs as it does without any, to the bit.
"""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from diffusers.loaders.lora_base import disable_lora_for_text_encoder, enable_lora_for_text_encoder
from diffusers.loaders.peft import PeftAdapterMixin

from giantleap.models.adapters.files import AdapterError, AdapterUse, largest_rank

_LOAD_ERRORS: Final = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of diffusers, peft and torch for files that do not fit a model."""


class AdapterCache:
    """The adapters of one pipeline; until there is an offer it has none.

    Args:
        pipeline: Of any class that a bundle may name.
        hotswap: Keep one adapter for each place in a call and exchange its weights, so that a compiled network is not
            compiled again for each adapter. An adapter of other layers than the one before it is loaded anew.
    """

    def __init__(self, pipeline: Any, hotswap: bool = False) -> None:
        self._pipeline = pipeline
        self._hotswap = hotswap
        self._paths: Mapping[str, Path] = {}
        self._budget_bytes = 0
        self._rank = 1  # the largest of the files
        self._places: list[AdapterUse | None] = []  # with hotswap, what each place holds, at weight 1
        self._sizes_bytes: OrderedDict[AdapterUse, int] = OrderedDict()  # at weight 1, the least recently used first

    def offer(self, paths: Mapping[str, Path], budget_bytes: int) -> None:
        """Let images name these files.

        Args:
            paths: The files by name.
            budget_bytes: Most bytes of files whose adapters are kept; those of one call may exceed it.

        Raises:
            AdapterError: One is no safetensors file, where their ranks matter.
        """
        self._paths, self._budget_bytes = paths, budget_bytes
        if self._hotswap:
            self._rank = largest_rank(paths.values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters that are kept, the least recently used first."""
        return tuple(use.name for use in (*self._sizes_bytes, *self._places) if use is not None)

    def activate(self, uses: Sequence[AdapterUse]) -> None:
        """Load missing adapters, and activate these, at their weights, and no others.

        Raises:
            AdapterError: A file is not there, is not the one that the job was planned with, or does not fit.
        """
        names = self._fill_places(uses) if self._hotswap else self._load_missing(uses)
        if not self.loaded:
            return
        self._switch(bool(uses))
        if uses:
            self._pipeline.set_adapters(names, [use.weight for use in uses])

    def _load_missing(self, uses: Sequence[AdapterUse]) -> list[str]:
        for use in uses:
            key = use.at_full_weight
            if key not in self._sizes_bytes:
                path = self._find(key)
                self._load(key, path, key.key)
                self._sizes_bytes[key] = path.stat().st_size
            self._sizes_bytes.move_to_end(key)
        self._evict(len(uses))
        return [use.key for use in uses]

    def _fill_places(self, uses: Sequence[AdapterUse]) -> list[str]:
        names = [f"place{index}" for index in range(len(uses))]
        self._places += [None] * (len(uses) - len(self._places))
        for index, (use, name) in enumerate(zip(uses, names, strict=True)):
            key = use.at_full_weight
            if self._places[index] == key:
                continue
            path = self._find(key)
            holds_one, self._places[index] = self._places[index] is not None, None
            if not (holds_one and self._exchange(key, path, name)):
                self._pipeline.enable_lora_hotswap(target_rank=self._rank, check_compiled="ignore")
                self._load(key, path, name)
            self._places[index] = key
        return names

    def _exchange(self, use: AdapterUse, path: Path, name: str) -> bool:
        """Put another adapter in a place; False, and the place is empty, where one of them has layers of its own."""
        holders = [part for part, held in self._pipeline.get_list_adapters().items() if name in held]
        if not all(isinstance(getattr(self._pipeline, part), PeftAdapterMixin) for part in holders):
            self._delete(name)  # what it added to a text encoder would stay
            return False
        try:
            self._load(use, path, name, hotswap=True)
        except AdapterError:
            return False
        return True

    def _find(self, use: AdapterUse) -> Path:
        if use.name not in self._paths:
            raise AdapterError(f"LoRA {use.name} was not in GIANTLEAP_LORA_DIR when this worker started; restart it")
        path = self._paths[use.name]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AdapterError(f"the file of LoRA {use.name} cannot be read: {error.strerror}") from None
        if digest != use.sha256:
            raise AdapterError(f"the file of LoRA {use.name} has changed since the API read it; restart the API")
        return path

    def _load(self, use: AdapterUse, path: Path, name: str, hotswap: bool = False) -> None:
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        options |= {"hotswap": True} if hotswap else {}
        try:
            with _without_advice():
                self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, **options)
        except _LOAD_ERRORS as error:
            self._delete(name)
            raise AdapterError(f"LoRA {use.name} does not fit this pipeline ({type(error).__name__})") from error

    def _evict(self, in_use: int) -> None:
        while len(self._sizes_bytes) > in_use and sum(self._sizes_bytes.values()) > self._budget_bytes:
            use, _ = self._sizes_bytes.popitem(last=False)
            self._delete(use.key)

    def _delete(self, name: str) -> None:
        with _without_advice():
            self._pipeline.delete_adapters(name)

    def _switch(self, on: bool) -> None:
        """Turn the layers of all adapters on or off, of the denoiser and the text encoders."""
        for name in self._pipeline.get_list_adapters():
            model = getattr(self._pipeline, name)
            if isinstance(model, PeftAdapterMixin):
                model.enable_lora() if on else model.disable_lora()
            else:
                (enable_lora_for_text_encoder if on else disable_lora_for_text_encoder)(model)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence peft where it warns of several adapters on one model and of a deleted active one: both are meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        yield
