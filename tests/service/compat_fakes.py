"""What the tests of the compatible fronts share: an app over a producer in memory that hands out real files."""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from fastapi import FastAPI
from PIL import Image
from safetensors.numpy import load, save

from giantleap.service.api.app import create_app
from giantleap.service.jobs.job import GenerateParams, Job, JobRecord, UpscaleParams
from giantleap.service.settings import read_settings
from tests.service.fake_producer import FakeProducer, succeed
from tests.service.paper_bundle import CHANNELS, write_paper_bundle

STAGES = "queue;dur=250.0, generate;dur=1000.0, upscale;dur=250.0, decode;dur=125.0, encode;dur=125.0"
LATENT = np.random.default_rng(0).standard_normal((1, CHANNELS, 4, 6)).astype(np.float32)
STRIDE_PX = 8


@dataclass
class FileProducer(FakeProducer):
    """Results are what the job asks for, without a network: a latent's pixels repeated, or an image of noise."""

    files: dict[str, list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.end = self.work

    def reset(self) -> Self:
        """Empty and without faults again."""
        self.end, self.refusal, self.outage, self.live_workers = self.work, None, None, 1
        for kept in (self.records, self.blobs, self.keys, self.files):
            kept.clear()
        return self

    def work(self, job: Job) -> JobRecord:
        record = succeed(job)
        if isinstance(job.params, UpscaleParams):  # a file for each item, a latent's too
            record = replace(record, results=record.results[:1] * job.params.batch_items)
        self.files[job.id] = [to_file(job, index) for index in range(len(record.results))]
        return record

    async def read_result(self, job_id: str, index: int, key: str | None = None) -> bytes | None:
        self._require_up()
        params = self.records[job_id].job.params
        if isinstance(params, UpscaleParams) and params.output == "latent":
            latent = self._enlarged(job_id, params)[index]
            return save({"latent": latent[:, None] if params.one_frame else latent})
        return self.files[job_id][index]

    def _enlarged(self, job_id: str, params: UpscaleParams) -> np.ndarray:
        if params.image_width_px is not None:
            size = np.asarray(read_pixels(self.blobs[job_id])).mean()
            return np.full((1, params.channels, params.latent_height, params.latent_width), size, np.float32)
        latent = load(self.blobs[job_id])["latent"]
        enlarged: np.ndarray = latent.repeat(int(params.scale), 2).repeat(int(params.scale), 3)
        return enlarged

    def latent_of(self, index: int = -1) -> np.ndarray:
        """The raw latent that a job was enqueued with."""
        return load(self.blobs[self.jobs[index].id])["latent"]


def to_file(job: Job, index: int) -> bytes:
    """An image of the right size and format, each of its own noise."""
    params = job.params
    if isinstance(params, GenerateParams):
        size, seed = (params.height_px, params.width_px), (params.seed + index) % 2**32
    else:
        factor = int(params.scale * STRIDE_PX)
        size, seed = (factor * params.latent_height, factor * params.latent_width), index
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, params.output_format)
    return file.getvalue()


def read_pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def write_compat_bundles(root: Path) -> tuple[Path, ...]:
    """One whose latents are not packed, and FLUX.1's, which are."""
    return write_paper_bundle(root / "paper"), write_paper_bundle(root / "flux", "flux", 'name = "flux1"')


def write_wan_bundle(root: Path) -> Path:
    """One of Wan 2.1's latent space, whose latents are videos of one frame."""
    bundle = write_paper_bundle(root / "paper")
    text = (bundle / "bundle.toml").read_text()
    start, end = text.index("[latent_space]"), text.index("[lua]")
    (bundle / "bundle.toml").write_text(f'{text[:start]}[latent_space]\nname = "wan21"\n{text[end:]}')
    return bundle


def build_app(producer: FakeProducer, bundle_dirs: tuple[Path, ...], **changes: object) -> FastAPI:
    """The real app; `changes` are settings."""
    given = {"bundle": bundle_dirs, "max_body_bytes": 1 << 20, "max_image_px": 512 * 512, "max_prompt_chars": 200}
    return create_app(read_settings(**given | changes), producer)  # type: ignore[arg-type]
