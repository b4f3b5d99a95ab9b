"""The report of how image files are written: every option of a request is a row, and the aim is judged."""

import numpy as np
import pytest

from benchmarks.images.encode import BASELINE, make_encoders, measure, to_markdown

MACHINE = {
    "model": "CPU",
    "cpu_capability": "AVX2",
    "load_1min": 0.5,
    "versions": {"pillow": "1"},
    "measured_at": "2026-01-01T00:00",
}


def test_every_option_is_timed_beside_the_former_files() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    rows = measure(pixels, make_encoders(with_others=False), runs=1)
    options = [f"{name}, {how}" for name in ("png", "jpeg", "webp") for how in ("fast", "small")]
    assert list(rows) == [BASELINE, *options]
    lossless = {name for name, row in rows.items() if row["psnr_db"] is None}
    assert lossless == {BASELINE, "png, fast", "png, small"} and rows[BASELINE]["times_as_fast"] == 1
    assert len(make_encoders(with_others=True)) > len(rows)


@pytest.mark.parametrize(("fast_s", "verdict"), [(0.2, "20 % of the time before; aim: 20 %, met"), (0.3, "30 %")])
def test_the_slowest_large_png_is_compared_with_the_aim(fast_s: float, verdict: str) -> None:
    def rows(cpu_s: float) -> dict[str, dict[str, float | None]]:
        row = {"mb": 1.0, "psnr_db": None, "times_as_fast": 1.0}
        return {BASELINE: {"cpu_s": 1.0, **row}, "png, fast": {"cpu_s": cpu_s, **row}}

    images = {"generated, 4096 px": rows(0.1), "grain, 4096 px": rows(fast_s), "grain, 512 px": rows(0.9)}
    text = to_markdown({"machine": MACHINE, "images": images})
    assert text.splitlines()[0] == "CPU with AVX2, one thread, load 0.5, pillow 1, 2026-01-01."
    assert verdict in text and ("missed" in text) == (fast_s > 0.2)
