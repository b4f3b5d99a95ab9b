"""The bundles that requests may name, as an API process reads them at start. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from giantleap.models.adapters.files import AdapterError, AdapterFile, AdapterUse, misfit, read_denoiser, read_directory
from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle
from giantleap.models.bundle.modes import read_misfit
from giantleap.models.bundle.vocabulary import PromptWords, read_prompt_words
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.requests import LoraRequest
from giantleap.service.settings import Settings


@dataclass(frozen=True, slots=True)
class ServedBundle:
    """A bundle that requests may name.

    Args:
        bundle: The bundle.
        words: None where its vocabulary is open.
        loras: The LoRA files that fit it, by name.
        misfits: Why the other ones do not.
    """

    bundle: Bundle
    words: PromptWords | None
    loras: Mapping[str, AdapterFile] = field(default_factory=dict)
    misfits: Mapping[str, str] = field(default_factory=dict)


def load_bundles(settings: Settings) -> dict[str, ServedBundle]:
    """Read the bundles of the settings, by name, the default first.

    Raises:
        BundleError: One cannot be served, two have the same name, an alias is a bundle's name or names none, or a
            file of the LoRA directory is no LoRA.
    """
    try:
        loras = {} if settings.lora_dir is None else read_directory(settings.lora_dir)
    except AdapterError as error:
        raise BundleError(str(error)) from error
    served: dict[str, ServedBundle] = {}
    for directory in settings.bundle:
        bundle = read_in_modes(directory, settings.modes)
        if bundle.name in served:
            raise BundleError(f"{directory}: another bundle is named {bundle.name} too; names must differ")
        served[bundle.name] = with_loras(ServedBundle(bundle, _read_words(bundle)), loras)
    for alias, name in settings.model_aliases.items():
        if alias in served or name not in served:
            raise BundleError(f"model_aliases: {alias}={name} must give a new name to one of {', '.join(served)}")
    return served


def read_in_modes(directory: Path, modes: Mapping[str, str]) -> Bundle:
    """Read a bundle with the modes of the settings in place of its own.

    Raises:
        BundleError: As `read_bundle`, or its pipeline cannot have these modes.
    """
    bundle = read_bundle(directory)
    try:
        chosen = bundle.modes.with_values(modes)
    except ValueError as error:
        raise BundleError(f"bundle {bundle.name}: its modes and those of the settings: {error}") from None
    if fault := read_misfit(chosen, bundle.pipeline, bundle.vae_directory):
        raise BundleError(f"bundle {bundle.name}: modes.{fault}")
    if chosen == bundle.modes:
        return bundle  # as its file has it
    return replace(bundle, descriptor=bundle.descriptor.model_copy(update={"modes": chosen}))


def with_loras(served: ServedBundle, loras: Mapping[str, AdapterFile]) -> ServedBundle:
    """A bundle with those of the LoRA files that fit it, and the reasons of the others."""
    pipeline, pipeline_class = served.bundle.pipeline, served.bundle.pipeline_class
    if not loras or isinstance(pipeline, str) or pipeline_class is None:
        return served
    denoiser = read_denoiser(pipeline)
    unusable = served.bundle.modes.lora_misfit
    reasons = {name: unusable or misfit(each, pipeline_class, denoiser) for name, each in loras.items()}
    fitting = {name: each for name, each in loras.items() if not reasons[name]}
    return replace(served, loras=fitting, misfits={name: reason for name, reason in reasons.items() if reason})


def choose_loras(requested: Sequence[LoraRequest], served: ServedBundle) -> tuple[AdapterUse, ...]:
    """The files of the LoRAs that a request names, in its order.

    Raises:
        InvalidFields: One is not served, does not fit the bundle, or is named twice.
    """
    faults = []
    names = [each.name for each in requested]
    for index, name in enumerate(names):
        if name in names[:index]:
            faults.append((f"loras.{index}.name", "is given twice; send each LoRA once, with the sum of its weights"))
        elif name in served.misfits:
            faults.append((f"loras.{index}.name", f"does not fit bundle {served.bundle.name}: {served.misfits[name]}"))
        elif name not in served.loras:
            known = ", ".join(served.loras) or "none (GIANTLEAP_LORA_DIR)"
            reason = f"is not served; bundle {served.bundle.name} has {known}"
            faults.append((f"loras.{index}.name", reason))
    if faults:
        raise InvalidFields(*faults)
    return tuple(served.loras[each.name].use(each.weight) for each in requested)


def _read_words(bundle: Bundle) -> PromptWords | None:
    if not bundle.closed_vocabulary or isinstance(bundle.pipeline, str):
        return None
    try:
        return read_prompt_words(bundle.pipeline)
    except (FileNotFoundError, ValueError) as error:
        raise BundleError(f"bundle {bundle.name}: {error}") from error


def select_bundle(bundles: Mapping[str, ServedBundle], name: str | None) -> ServedBundle:
    """The bundle of a name, or the default one where the name is None.

    Raises:
        InvalidFields: No bundle has the name.
    """
    if name is None:
        return next(iter(bundles.values()))
    if name not in bundles:
        raise InvalidFields(("bundle", f"is not served here; available are {', '.join(bundles)}"))
    return bundles[name]
