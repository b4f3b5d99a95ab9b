"""Checks of the machine itself, where the service runs on it."""

import shutil
from pathlib import Path
from typing import Final

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn

_FULL_BYTES: Final = 256 << 20
_NEARLY_FULL_SHARE: Final = 0.1


def check_disk(data_dir: Path, local: bool) -> Finding:
    """Whether the data directory, with the append-only file of the embedded Redis, has room."""
    if not local or not data_dir.is_dir():
        why = f"{data_dir} is not on this machine" if local else "the service is on another machine"
        return skipped("disk", why, "run the doctor on the host of the service, with its GIANTLEAP_DATA_DIR")
    usage = shutil.disk_usage(data_dir)
    return judge_disk(data_dir, usage.free, usage.total)


def judge_disk(data_dir: Path, free_bytes: int, total_bytes: int) -> Finding:
    """Whether a disk has room."""
    found = f"{free_bytes / 2**30:.1f} GiB are free below {data_dir}"
    if free_bytes < _FULL_BYTES:
        return fail("disk", found, "free space: a full disk stops every write of Redis")
    if free_bytes < _NEARLY_FULL_SHARE * total_bytes:
        return warn("disk", f"{found}, less than a tenth", "free space")
    return ok("disk", found)
