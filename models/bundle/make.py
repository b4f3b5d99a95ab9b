"""A bundle with other LUA weights: in memory (`with_lua`), or as a directory that can be served (`make_bundle`)."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from giantleap.models.bundle.bundle import DESCRIPTOR, Bundle, BundleError, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Defaults, Descriptor, LuaFile
from giantleap.models.bundle.digests import file_hash
from giantleap.models.bundle.paths import LOCK
from giantleap.models.bundle.pull import LUA_FILE
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import SPEC_KEY
from giantleap.models.lua.statistics import STATISTICS_KEY


def with_lua(bundle: Bundle, weights: Path) -> Bundle:
    """The bundle with other LUA weights, which become its default method; no file is written.

    Raises:
        BundleError: The weights are not for the bundle's latents.
        CheckpointError: The weights cannot be read.
        FileNotFoundError: There is no such file.
    """
    net = read_lua(weights)
    old, descriptor = bundle.descriptor.lua, bundle.descriptor
    changes = {
        "lua": LuaFile(file=str(weights.absolute()), scales=net.spec.scales, sha256=file_hash(weights)),
        "lua_source": None,
        "defaults": _to_defaults(descriptor.defaults, net),
        # The bundle's own weights stay in its directory, where every file must be listed.
        "files": descriptor.files | ({} if old is None else {old.file: old.sha256}),
    }
    changed = replace(bundle, descriptor=descriptor.model_copy(update=changes), has_other_lua=True)
    changed.check_lua(net.spec)
    return changed


def make_bundle(base: Bundle, weights: Path, name: str, directory: Path, about: Mapping[str, str]) -> Bundle:
    """Write a bundle: all parts of another one, with these LUA weights as its default method.

    Args:
        base: The bundle whose VAE the weights were trained for; parts on the hub stay there, for `bundle pull`.
        weights: A LUA, in any supported layout.
        name: Of the new bundle.
        directory: New or empty.
        about: Further keys of `[bundle]`: title, license, provenance.

    Raises:
        BundleError: The directory is not empty, or the weights or the name do not fit.
        CheckpointError: The weights cannot be read.
        FileNotFoundError: There is no such file.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BundleError(f"{directory} is not empty; name another directory")
    net = read_lua(weights)
    base.check_lua_channels(net.spec)
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        _copy_parts(base, draft)
        _write_weights(net, weights, draft / LUA_FILE)
        write_bundle(draft, _to_descriptor(base, net, weights, draft / LUA_FILE, {"name": name, **about}))
        read_bundle(draft)
        draft.chmod(0o755)  # mkdtemp gives 0700
        draft.replace(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return read_bundle(directory)


def _copy_parts(base: Bundle, draft: Path) -> None:
    lua = base.descriptor.lua
    skipped = {DESCRIPTOR, LOCK} | (set() if lua is None else {lua.file})

    def ignore(folder: str, names: list[str]) -> set[str]:
        place = Path(folder).relative_to(base.directory)
        return {each for each in names if (place / each).as_posix() in skipped or each.startswith(".")}

    shutil.copytree(base.directory, draft, ignore=ignore, dirs_exist_ok=True)


def _write_weights(net: Lua, weights: Path, target: Path) -> None:
    """Copy weights in our own layout as they are; convert others."""
    if SPEC_KEY in _header(weights):
        shutil.copyfile(weights, target)
    else:
        write_lua(target, net, {"origin": f"{weights.name}, sha256 {file_hash(weights)}"})


def _to_descriptor(base: Bundle, net: Lua, weights: Path, written: Path, about: Mapping[str, str]) -> Descriptor:
    descriptor = base.descriptor
    values: dict[str, Any] = descriptor.model_dump(exclude_unset=True, exclude_none=True)
    trained = f"LUA of {weights.name}, sha256 {file_hash(weights)[:12]}"
    values["bundle"] |= {"provenance": f"{base.about.provenance} {trained}.", **about}
    values["lua"] = {"file": LUA_FILE, "scales": net.spec.scales, "sha256": file_hash(written)}
    if base.clamp_sigmas is not None and STATISTICS_KEY in _header(written):
        values["lua"]["clamp_sigmas"] = base.clamp_sigmas
    values["defaults"] = _to_defaults(descriptor.defaults, net).model_dump()
    values.pop("lua_source", None)
    if descriptor.lua is not None:
        values.get("files", {}).pop(descriptor.lua.file, None)
    return Descriptor.model_validate(values)


def _to_defaults(defaults: Defaults, net: Lua) -> Defaults:
    scale = defaults.scale if defaults.scale in net.spec.scales else min(net.spec.scales)
    return defaults.model_copy(update={"method": "lua", "scale": scale})


def _header(weights: Path) -> Mapping[str, str]:
    if weights.suffix != ".safetensors":
        return {}
    with safe_open(weights, framework="numpy") as file:
        header: Mapping[str, str] = file.metadata() or {}
    return header
