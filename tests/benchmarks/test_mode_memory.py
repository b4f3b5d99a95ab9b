"""The figures of docs/memory-modes.md are those of the script, and the descriptor of FLUX.1 in 24 GB keeps its word."""

from pathlib import Path

from benchmarks.mode_memory.run import device_bytes, flux1_networks
from giantleap.models.bundle.bundle import read_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "memory-modes.md"


def test_the_page_has_the_figures_of_the_script_and_flux1_fits_24_gb() -> None:
    sizes, page = device_bytes(flux1_networks()), PAGE.read_text()
    for modes, size in sizes.items():
        name = modes if modes == "none" else f"`{modes}`"
        assert f"| {name} | {size / 1e9:.1f} |" in page
    bundle = read_bundle(ROOT / "deploy" / "bundles" / "flux1-dev-24gb")
    (mode,) = (f"{name}={value}" for name, value in bundle.modes.named.items())
    assert sizes[mode] < 20e9, "24 GB hold the weights and 4 GB of activations"
    plain = read_bundle(ROOT / "bundles" / "flux1-dev")
    left_out = {"bundle", "modes"}
    assert bundle.descriptor.model_dump(exclude=left_out) == plain.descriptor.model_dump(exclude=left_out)
