"""Makes a self-contained bundle of one whose parts are on the hub: pipeline, VAE, tiny VAE and LUA in one directory.

`pull.json` in the directory records the requested revisions and their commits before the first download, so that an
interrupted pull continues with the same files. Weights are downloaded as safetensors only; a released LUA in torch's
own format is read without unpickling code (`models/lua/checkpoints.py`) and converted. `bundle.toml` is written last: a
directory with it is complete and needs no network.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from giantleap.models.bundle.bundle import DESCRIPTOR, Bundle, BundleError, check_files, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.bundle.digests import WEIGHT_SUFFIXES, file_hash
from giantleap.models.bundle.hub import Hub, HubSnapshot
from giantleap.models.bundle.paths import LOCK

LUA_FILE = "lua.safetensors"
_DOWNLOADS = ".downloads"  # hidden from the bundle's own list of weights

_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json and the like
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d{5}-of-\d{5})?"
    r"\.safetensors(?P<index>\.index(?:\.(?P<index_variant>[A-Za-z0-9_]+))?\.json)?"
)
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor", "ProcessorFast")  # by class
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Part = dict[str, str]


@dataclass
class _Lock:
    """`pull.json`: hub id, revision and commit of each part, and the SHA-256 of each complete file."""

    path: Path
    name: str
    parts: dict[str, Part] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        content = {"name": self.name, "parts": self.parts, "files": dict(sorted(self.files.items()))}
        draft = self.path.with_name(f".{self.path.name}")
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        draft.replace(self.path)


def choose_pipeline_files(
    names: Sequence[str], model_index: Mapping[str, Any], variant: str | None
) -> tuple[list[str], str | None]:
    """Select the files of a diffusers pipeline that `from_pretrained` needs.

    Args:
        names: All files of the repository.
        model_index: Content of `model_index.json`, which names the parts.
        variant: Variant of the weights, for the parts that have it; None: the only one of a part without plain weights.

    Returns:
        The files, and the variant to load them with.

    Raises:
        BundleError: A part has no weights, or none that are loaded.
    """
    parts = {key: str(value[1]) for key, value in model_index.items() if isinstance(value, list) and value[0]}
    own = {part: [n for n in names if n.startswith(f"{part}/") and n.count("/") == 1] for part in parts}
    for part, files in own.items():
        if not files:
            raise BundleError(f"model_index.json names the part {part}, of which the repository has no file")
        variant = variant or _only_variant(part, files)
    chosen = ["model_index.json", *(name for name in names if re.fullmatch(r"(?i)licen[cs]e[^/]*", name))]
    for part, class_name in parts.items():
        has_weights = not class_name.endswith(_WITHOUT_WEIGHTS)
        files, found = choose_model_files(own[part], variant, part if has_weights else None)
        if found not in (None, variant):
            raise BundleError(f"{part}: its weights come as variant {found} only; the pipeline's is {variant}")
        chosen += files
    return chosen, variant


def choose_model_files(
    names: Sequence[str], variant: str | None = None, part: str | None = None
) -> tuple[list[str], str | None]:
    """Select the files of one model directory: its configuration, and its weights as safetensors.

    Args:
        names: All files of the directory.
        variant: Variant of the weights; plain ones do where it is missing. None: plain ones, or else the only variant.
        part: Name of a model, for messages; None for a part that may have no weights.

    Returns:
        The files, and the variant of the weights.

    Raises:
        BundleError: The model has no weights, or none that are loaded.
    """
    variants = _weight_variants(names)
    wanted = variant if variant in variants.values() else None
    if wanted is None:
        wanted = _only_variant(part or "model", names)
    chosen = [name for name, own in variants.items() if own == wanted]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not chosen:
        raise BundleError(f"{pickles[0]}: these weights come as pickles only, which are not loaded")
    if part is not None and not chosen and any(name.rpartition("/")[2] == "config.json" for name in names):
        raise BundleError(f"{part}: the repository has no weights as safetensors; name another one")
    configs = [name for name in names if name.endswith(_CONFIG_SUFFIXES) and ".index." not in name]
    return configs + chosen, wanted


def _weight_variants(names: Sequence[str]) -> dict[str, str | None]:
    """The weight files with their variants."""
    weights = {name: match for name in names if (match := _WEIGHTS.fullmatch(name.rpartition("/")[2]))}
    return {name: match["variant"] or match["index_variant"] for name, match in weights.items()}


def _only_variant(part: str, names: Sequence[str]) -> str | None:
    """The one variant of a model without plain weights; None where there are plain ones, or no weights.

    Raises:
        BundleError: There are several.
    """
    variants = set(_weight_variants(names).values())
    if not variants or None in variants:
        return None
    if len(variants) > 1:
        known = ", ".join(sorted(filter(None, variants)))
        raise BundleError(f"{part}: its weights come as variants {known}; name one as `variant` in bundle.toml")
    return variants.pop()


def pull_bundle(bundle: Bundle, directory: Path, hub: Hub, report: Callable[[str], object]) -> Bundle:
    """Download all parts of a bundle into a directory, which then is a bundle itself. An interrupted pull continues.

    Args:
        bundle: One whose pipeline is a hub id; weights beside its descriptor are copied.
        directory: New, empty, or of an earlier pull of the same bundle.
        hub: Where to download from.
        report: Called with a line for each part.

    Returns:
        The bundle in `directory`, checked.

    Raises:
        BundleError: The bundle has no hub id, the directory holds something else, there is too little space, or a
            download does not fit the descriptor.
        HubError: The hub does not give a file; the same call resumes later.
    """
    if not isinstance(bundle.pipeline, str):
        raise BundleError(
            f"bundle {bundle.name} is a local one, with nothing to pull: its pipeline is in {bundle.pipeline}"
        )
    if (directory / DESCRIPTOR).exists():
        report(f"{directory} is complete; its files are compared with their digests")
        done = read_bundle(directory)
        if done.name != bundle.name:
            raise BundleError(f"{directory} holds bundle {done.name}; give another directory")
        check_files(done)
        return done
    directory.mkdir(parents=True, exist_ok=True)
    lock = _open_lock(directory / LOCK, bundle.name)
    _Pull(bundle, directory, hub, lock, report).run()
    return read_bundle(directory)


def _open_lock(path: Path, name: str) -> _Lock:
    if not path.exists():
        if any(path.parent.iterdir()):
            raise BundleError(f"{path.parent} is not empty and not from an earlier pull; give another directory")
        return _Lock(path, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lock = _Lock(path, content["name"], content["parts"], content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged; delete {path.parent} and pull again") from error
    if lock.name != name:
        raise BundleError(f"{path.parent} holds a pull of bundle {lock.name}; give another directory")
    return lock


@dataclass
class _Pull:
    bundle: Bundle
    directory: Path
    hub: Hub
    lock: _Lock
    report: Callable[[str], object]

    def run(self) -> None:
        descriptor = self.bundle.descriptor
        values: dict[str, Any] = descriptor.model_dump(exclude_unset=True, exclude_none=True)
        self._copy_own_files()
        for part, source in (
            ("pipeline", descriptor.pipeline),
            ("vae", descriptor.vae),
            ("tiny_vae", descriptor.tiny_vae),
        ):
            if source is None or source.hub_id is None:
                continue
            variant = self._fetch_part(part, str(source.hub_id), str(source.revision), source.variant)
            values[part] = {
                key: value for key, value in values[part].items() if key not in ("hub_id", "revision", "variant")
            }
            values[part] |= {"path": part} | ({} if variant is None else {"variant": variant})
        if descriptor.lua is None and descriptor.lua_source is not None and descriptor.lua_source.hub_id is not None:
            values["lua"] = self._fetch_lua()
            values["defaults"]["method"] = "lua"
            del values["lua_source"]
        values["origin"] = {part: f"{locked['hub_id']}@{locked['commit']}" for part, locked in self.lock.parts.items()}
        values["files"] = {name: sha for name, sha in self.lock.files.items() if name.endswith(WEIGHT_SUFFIXES)}
        shutil.rmtree(self.directory / _DOWNLOADS, ignore_errors=True)
        write_bundle(self.directory, Descriptor.model_validate(values))

    def _copy_own_files(self) -> None:
        """Copy and verify the files beside the descriptor: LUA and SwinIR weights, a VAE."""
        descriptor = self.bundle.descriptor
        own = descriptor.files | ({} if descriptor.lua is None else {descriptor.lua.file: descriptor.lua.sha256})
        for source in (descriptor.vae, descriptor.tiny_vae):
            if source is not None and source.path is not None:
                shutil.copytree(self.bundle.directory / source.path, self.directory / source.path, dirs_exist_ok=True)
        for name, digest in own.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.bundle.directory / name, path)
            if file_hash(path) != digest:
                raise BundleError(f"{self.bundle.directory / name} is not the file with sha256 {digest}")
            self.lock.files[name] = digest
        self.lock.write()

    def _fetch_part(self, part: str, hub_id: str, revision: str, variant: str | None) -> str | None:
        """Download a part; returns the variant of its weights."""
        snapshot = self._snapshot(part, hub_id, revision)
        if part != "pipeline":
            top = [name for name in snapshot.files if "/" not in name]
            names, variant = choose_model_files(top, variant, part)
        elif "model_index.json" not in snapshot.files:
            raise BundleError(f"{hub_id} is no diffusers pipeline: model_index.json is missing")
        else:
            self._fetch_files(part, snapshot, ["model_index.json"])
            index = json.loads((self.directory / part / "model_index.json").read_text(encoding="utf-8"))
            names, variant = choose_pipeline_files(list(snapshot.files), index, variant)
        self._fetch_files(part, snapshot, names)
        self._check_shards(part, names)
        return variant

    def _check_shards(self, part: str, names: Sequence[str]) -> None:
        """Refuse weights whose index names a file that the repository does not have."""
        for name in (each for each in names if ".index." in each and each.endswith(".json")):
            path = self.directory / part / name
            for shard in set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()):
                if not (path.parent / shard).is_file():
                    raise BundleError(f"{part}: {name} names {shard}, which the repository lacks; name another one")

    def _snapshot(self, part: str, hub_id: str, revision: str) -> HubSnapshot:
        """The snapshot that an earlier run chose, so that files of two commits never mix."""
        locked = self.lock.parts.get(part)
        if locked is not None and (locked["hub_id"], locked["revision"]) != (hub_id, revision):
            raise BundleError(
                f"{self.directory} was pulled from {locked['hub_id']} at {locked['revision']}; delete it first"
            )
        snapshot = self.hub.snapshot(hub_id, revision if locked is None else locked["commit"])
        self.lock.parts[part] = {"hub_id": hub_id, "revision": revision, "commit": snapshot.commit}
        self.lock.write()
        return snapshot

    def _fetch_files(self, part: str, snapshot: HubSnapshot, names: Sequence[str]) -> None:
        """Download the missing files; each is recorded once it is complete."""
        missing = [name for name in names if not self._is_here(f"{part}/{name}", snapshot.files[name].size_bytes)]
        total = sum(snapshot.files[name].size_bytes for name in missing)
        if not missing:
            return
        free = shutil.disk_usage(self.directory).free
        if total > free:
            raise BundleError(f"{part} needs {total} bytes in {self.directory}; {free} are free")
        if missing != ["model_index.json"]:
            self.report(f"{part}: {len(missing)} files, {total / 1e9:.2f} GB, {snapshot.hub_id} at {snapshot.commit}")
        for name in missing:
            path = self.directory / part / name
            if not path.resolve().is_relative_to((self.directory / part).resolve()):
                raise BundleError(f"{snapshot.hub_id}: the file name {name!r} leaves the directory")
            digest = self.hub.fetch(snapshot, name, path)
            self.lock.files[f"{part}/{name}"] = digest
            self.lock.write()

    def _is_here(self, name: str, size_bytes: int) -> bool:
        path = self.directory / name
        return name in self.lock.files and path.is_file() and path.stat().st_size == size_bytes

    def _fetch_lua(self) -> dict[str, Any]:
        """Download the released weights and convert them to our format; returns the `[lua]` section."""
        from giantleap.models.lua.checkpoints import read_lua, write_lua

        source = self.bundle.descriptor.lua_source
        assert source is not None and source.file is not None and source.scales is not None
        snapshot = self._snapshot("lua", str(source.hub_id), str(source.revision))
        path = self.directory / LUA_FILE
        if LUA_FILE not in self.lock.files or not path.is_file():
            if source.file not in snapshot.files:
                raise BundleError(f"{snapshot.hub_id} has no file {source.file}")
            self._fetch_files(_DOWNLOADS, snapshot, [source.file])
            released = self.directory / _DOWNLOADS / source.file
            net = read_lua(released)
            space = self.bundle.latent_space
            if (net.spec.scales, net.spec.channels) != (tuple(sorted(source.scales)), space.channels):
                raise BundleError(
                    f"{source.file} of {source.hub_id}: found heads {net.spec.scales} for {net.spec.channels} "
                    f"channels; expected {source.scales} for {space.channels}"
                )
            digest = self.lock.files.pop(f"{_DOWNLOADS}/{source.file}")
            origin = f"{source.file} of {source.hub_id} at {snapshot.commit}, sha256 {digest}"
            write_lua(path, net, {"origin": origin})
            self.lock.files[LUA_FILE] = file_hash(path)
            self.lock.write()
        return {"file": LUA_FILE, "scales": tuple(source.scales), "sha256": self.lock.files[LUA_FILE]}
