"""Enlarge a folder of latents (.npy) on a Ray cluster. Run it again after a failure: rows that are done are not drawn.

In an environment with `giantleap` and `ray[data]`: `python examples/ray_batch.py LATENTS OUTPUT --actors 2`
"""

import argparse
from pathlib import Path
from typing import Any

import ray

from giantleap.batch.ray import RowActor
from giantleap.batch.rows import BatchOptions


def to_row(file: dict[str, Any]) -> dict[str, Any]:
    """The row of a file: its name is the key."""
    return {"key": Path(file["path"]).stem, "latent": file["bytes"]}


def main() -> None:
    """Read the command line, run, print how many rows there are and which failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents")
    parser.add_argument("output", type=Path, help="a folder that all nodes share")
    parser.add_argument("--bundle", default="pocket")
    parser.add_argument("--scale", type=float, default=2)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; 0 runs on the CPU")
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()

    ray.init(num_cpus=None if given.gpus else given.actors + 1, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_binary_files(given.latents, include_paths=True).map(to_row)
    entries = rows.map_batches(
        RowActor,
        fn_constructor_args=(
            str(given.output.absolute()),
            BatchOptions(scale=given.scale, batch_size=given.batch_size),
        ),
        fn_constructor_kwargs={"bundle": given.bundle, "device": "cuda" if given.gpus else "cpu"},
        concurrency=given.actors,
        num_gpus=given.gpus,
        batch_size=given.batch_size,
    ).take_all()
    failed = [entry for entry in entries if entry["error"] is not None]
    print(
        f"{len(entries)} rows, {len(failed)} failed",
        *(f"{entry['key']}: {entry['error']}" for entry in failed),
        sep="\n",
    )


if __name__ == "__main__":
    main()
