"""Checks on this machine: the disk of the data directory, and the result store."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.errors import BadConfiguration, StoreUnavailable
from giantleap.service.results.store import check_store, open_store
from giantleap.service.settings import Settings

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


def check_results(settings: Settings, local: bool) -> Finding:
    """Whether the store of results that is set here can be used.

    Writes to a bucket only: a directory or file that the doctor's user makes would be closed to the service's.
    """
    url = urlsplit(settings.result_store or "redis")
    if url.scheme == "file":
        directory = Path(unquote(url.path))
        if not local or not directory.is_dir():
            where = "on another machine" if not local else "not there before the first result"
            return skipped("store", f"{directory} is {where}", "run the doctor on the service's host, after a job")
        usage = shutil.disk_usage(directory)
        return replace(judge_disk(directory, usage.free, usage.total), check="store")
    if url.scheme != "s3":
        return skipped("store", "no store of results is set here", "set GIANTLEAP_RESULT_STORE as the service has it")
    try:
        check_store(open_store(settings))
    except (BadConfiguration, StoreUnavailable) as error:
        return fail("store", error.detail, "correct GIANTLEAP_RESULT_STORE, AWS_* or the rights in the bucket")
    return ok("store", f"the bucket {url.netloc} takes and deletes a result")
