"""The bundles that requests may name, as an API process reads them at start. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle
from giantleap.models.bundle.vocabulary import PromptWords, read_prompt_words
from giantleap.service.errors import InvalidFields
from giantleap.service.settings import Settings


@dataclass(frozen=True, slots=True)
class ServedBundle:
    """A bundle that requests may name; `words` is None where its vocabulary is open."""

    bundle: Bundle
    words: PromptWords | None


def load_bundles(settings: Settings) -> dict[str, ServedBundle]:
    """Read the bundles of the settings, by name, the default first.

    Raises:
        BundleError: One cannot be served, two have the same name, or an alias is a bundle's name or names none.
    """
    served: dict[str, ServedBundle] = {}
    for directory in settings.bundle:
        bundle = read_bundle(directory)
        if bundle.name in served:
            raise BundleError(f"{directory}: another bundle is named {bundle.name} too; names must differ")
        served[bundle.name] = ServedBundle(bundle, _read_words(bundle))
    for alias, name in settings.model_aliases.items():
        if alias in served or name not in served:
            raise BundleError(f"model_aliases: {alias}={name} must give a new name to one of {', '.join(served)}")
    return served


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
