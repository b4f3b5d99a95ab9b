"""One running service for every example: the pocket bundle, one that edits, and one with the latents of FLUX.2."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from giantleap.models.bundle.bundle import write_bundle
from giantleap.models.bundle.descriptor import About
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.latent_space import LATENT_SPACES
from tests.running_service import serving

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a-long-random-text"


@pytest.fixture(scope="package")
def url(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from tests.models.generation.test_generator_families import saved
    from tests.tiny_pipelines import tiny_flux2_klein

    klein = tmp_path_factory.mktemp("klein")
    about = About(name="klein", title="Tiny", license="Apache-2.0", provenance="Random weights.")
    bundle = saved(klein, tiny_flux2_klein(), LATENT_SPACES["flux2"], bundle=about)
    write_bundle(klein, bundle.descriptor.model_copy(update={"files": file_hashes(klein)}))
    pocket = ROOT / "bundles" / "pocket"
    with serving(pocket, tiny_bundle_dir, klein, webhook_secret=SECRET, webhook_allow_private=True) as url:
        yield url
