"""The load benchmark: its client counts what a server answers, and its page says what its report says."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.client import Load, OpenLoop, run_closed, run_open, to_request
from benchmarks.load.compare import format_errors
from benchmarks.load.overload import pinned_to_one_core
from benchmarks.load.page import PAGE, to_markdown
from benchmarks.load.run import FIGURES, summarize, to_form
from benchmarks.load.service import part_of, used_cpu_s
from tests.streams import close_stream

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "load.json"
PARTS_MS = {"cpu_api_ms": 0.75, "cpu_worker_ms": 0.2, "cpu_redis_ms": 0.3}


async def answer_one_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, refuse_every: int) -> None:
    """A server that refuses each so many-th request of a connection; the head and the body come apart."""
    number = 0
    while head := await reader.readuntil(b"\r\n\r\n"):
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        number += 1
        refused = number % refuse_every == 0
        writer.write(b"HTTP/1.1 429 Busy\r\nRetry-After: 3\r\n" if refused else b"HTTP/1.1 200 OK\r\n")
        await writer.drain()
        writer.write(b"Content-Length: 4\r\n\r\n")
        await writer.drain()
        writer.write(b"done")
        await writer.drain()


@asynccontextmanager
async def serve(refuse_every: int) -> AsyncIterator[int]:
    """The port of a server; it has closed every connection when this ends."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await answer_one_in(reader, writer, refuse_every)
        await close_stream(writer)

    def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.create_task(handle(reader, writer)))

    async with await asyncio.start_server(start, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*handlers)


async def test_closed_run_counts_every_answer_of_every_client() -> None:
    async with serve(refuse_every=10**9) as port:
        load = await run_closed(port, to_request("/", b"x" * 9, {}), clients=3, warm_up=3, seconds=0.2)
    assert len(load.times_ms) > 3 and load.duration_s >= 0.2
    assert min(load.times_ms) <= load.median_ms <= load.quantile_ms(0.99) <= max(load.times_ms)


async def test_closed_run_ends_at_a_refusal() -> None:
    async with serve(refuse_every=4) as port:
        with pytest.raises(RuntimeError, match="429"):
            await run_closed(port, to_request("/", b"", {}), clients=1, warm_up=1, seconds=60)


async def test_closed_run_keeps_refusals_apart_where_they_are_allowed() -> None:
    async with serve(refuse_every=4) as port:
        load = await run_closed(port, to_request("/", b"", {}), 1, warm_up=1, seconds=0.2, allowed=(200, 429))
    assert load.offered == len(load.times_ms) + len(load.refused) and 0 < len(load.refused) < len(load.times_ms)


def test_pinning_holds_for_the_block_and_for_what_it_starts() -> None:
    before = os.sched_getaffinity(0)
    with pinned_to_one_core():
        assert len(os.sched_getaffinity(0)) == 1
        code = "import os; print(len(os.sched_getaffinity(0)))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"1\n"
    assert os.sched_getaffinity(0) == before


async def test_open_run_keeps_refusals_apart_with_their_headers() -> None:
    async with serve(refuse_every=2) as port:
        load = await asyncio.to_thread(run_open, port, to_request("/", b"", {}), per_s=200, seconds=0.5, seed=1)
    assert load.offered == len(load.times_ms) + len(load.refused) > 20
    assert {(response.status, response.headers["retry-after"]) for response in load.refused} == {(429, "3")}
    assert load.cpu_s > 0


async def test_the_open_run_goes_on_when_the_server_closes_an_idle_connection() -> None:
    opened: list[asyncio.StreamWriter] = []

    async def answer_one_and_close_the_others(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for other in opened:
                if other is not writer:
                    await close_stream(other)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await close_stream(writer)

    async with await asyncio.start_server(answer_one_and_close_the_others, "127.0.0.1", 0) as server:
        poll = OpenLoop(server.sockets[0].getsockname()[1], to_request("/", b"", {}))
        answers = await asyncio.to_thread(poll.run, [0.0])
        poll.close()
    assert len(answers) == 1


async def test_a_time_of_the_open_run_starts_when_the_request_was_due() -> None:
    requests = 20

    async def answer_all_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        waiting.append(writer)
        if len(waiting) == requests:
            for each in waiting:
                each.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    waiting: list[asyncio.StreamWriter] = []
    async with await asyncio.start_server(answer_all_at_the_end, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        poll = OpenLoop(port, to_request("/", b"", {}))
        answers = await asyncio.to_thread(poll.run, [-60.0] * requests)  # a minute late
        poll.close()
        for writer in waiting:
            await close_stream(writer)
    assert len(answers) == requests and min(time_ms for _, time_ms in answers) >= 60_000


def test_quantile_is_the_nearest_rank() -> None:
    load = Load([float(n) for n in range(100, 0, -1)], [], 2.0)
    assert (load.quantile_ms(0.0), load.quantile_ms(0.99), load.quantile_ms(1.0)) == (1.0, 100.0, 100.0)
    assert load.per_s == 50.0


def test_summary_is_the_median_of_the_rounds() -> None:
    rounds = [
        {
            run: {"p50_ms": p50, "p99_ms": 2 * p50, "per_s": 1000 / p50, "cpu_ms": 3.0} | PARTS_MS
            for run in ("no-op, 1", "no-op, 8", "no-op, 64", "128 KiB", "512 KiB", "2 MiB")
        }
        for p50 in (1.0, 9.0, 2.0)
    ]
    medians = summarize(rounds)
    assert medians["no-op, 1"] == {"p50_ms": 2.0, "p99_ms": 4.0, "per_s": 500.0, "cpu_ms": 3.0} | PARTS_MS


def test_processor_time_is_split_by_what_a_process_is() -> None:
    assert part_of(["/usr/bin/redis-server 127.0.0.1:6379"]) == "redis"
    assert part_of(["/wheel/valkey-server 127.0.0.1:6379"]) == "redis"
    assert part_of([sys.executable, "-m", "benchmarks.load.service", "1", "0.0"]) == "worker"
    assert part_of([sys.executable, "-m", "giantleap", "api"]) == "api"
    assert set(used_cpu_s()) == {"api", "worker", "redis"}


def test_two_checkouts_are_compared_round_by_round() -> None:
    before = {"no-op, 1": [dict.fromkeys(FIGURES, value) for value in (1.0, 2.0, 4.0)]}
    after = {"no-op, 1": [dict.fromkeys(FIGURES, value) for value in (2.0, 1.0, 1.0)]}
    lines = format_errors(before, after)
    assert "| no-op, 1 | cpu_redis_ms | 2.00 | 1.00 | 0.50 |" in lines and len(lines) == 2 + len(FIGURES)


def report() -> dict[str, Any]:
    run = {"p50_ms": 1.5, "p99_ms": 3.0, "per_s": 600.0, "cpu_ms": 1.25} | PARTS_MS
    ours = dict.fromkeys(("no-op, 1", "no-op, 8", "no-op, 64", "128 KiB", "512 KiB", "2 MiB"), run)
    overload = {
        "workers": 4, "work_ms": 100.0, "work_spread": 0.2, "queue_limit": 6,
        "capacity_per_s": 40.0, "offered_per_s": 400.0,
        "accepted_per_s": 39.0, "refused_share": 0.9, "refusals_with_retry_after": 3600, "unloaded_p50_ms": 102.0,
        "unloaded_p99_ms": 110.0, "accepted_p50_ms": 140.0, "accepted_p99_ms": 176.0, "p99_ratio": 1.6,
    }  # fmt: skip
    return {
        "date": "2026-11-21T15:00:00+00:00", "machine": "a machine", "python": "3.11", "redis_server": "7.0.15",
        "peers": {"ray": "2.60.0"}, "load_average_before": [0.1, 0.2, 0.3], "load_average_after": [1.0, 1.0, 1.0],
        "rounds": 3, "seconds": 3.0, "warm_up": 200, "overload": overload,
        "overload_pinned": overload | {"p99_ratio": 2.5, "repetitions": 5, "client_ms": 0.05},
        "refusals": {
            "clients": 8, "accepted": 900, "refused": 9000,
            "accepted_api_ms": 0.8, "refused_api_ms": 0.04, "ratio": 0.05,
        },
        "medians": {"giantleap": ours, "ray": {"no-op, 1": run | {"p50_ms": 6.0, "p99_ms": 9.0, "per_s": 150.0}}},
    }  # fmt: skip


def test_page_has_the_figures_and_the_ratios() -> None:
    page = to_markdown(report())
    assert "| Ray Serve | no-op, 1 client | 6 | 9 | 150 | 1.25 | 4.00 | 4.00 |" in page
    assert "| 4 workers | 102 | 110 | 140 | 176 | 1.6 | 90.0 % |" in page
    assert "| 4 workers, all on one core | 102 | 110 | 140 | 176 | 2.5 | 90.0 % |" in page
    assert "| no-op, 1 client | 1.5 | 3 | 600 | 1.25 | 0.75 | 0.2 | 0.3 |" in page
    assert "{" not in page and "Ray Serve 2.60.0" in page


def test_page_says_by_how_much_a_target_is_missed() -> None:
    page = to_markdown(report())
    assert "| accepted p99 under overload over unloaded p99 | <= 2 | 1.6 | met |" in page
    assert "| accepted p99 under overload over unloaded p99, all on one core | <= 2 | 2.5 | 25 % |" in page
    assert page.count("the client takes 0.050 ms of processor time per request") == 1
    assert "| processor time of a refused request over an accepted one, API | <= 0.1 | 0.05 | met |" in page
    assert "| smallest ratio beside Ray Serve (p50, no-op, 1 client) | >= 1 | 4 | met |" in page
    slow = report()
    runs = {
        run: {"p50_ms": 0.6, "p99_ms": 1.0, "per_s": 1000.0, "cpu_ms": 1.0}
        for run in ("no-op, 1", "no-op, 8", "512 KiB")
    }
    slow["peers"], slow["medians"]["litserve"] = {"litserve": "0.2"}, runs
    assert "| p50 of a no-op at 1 client beside LitServe | >= 0.5 | 0.4 | 20 % |" in to_markdown(slow)


def test_page_without_peers_names_none() -> None:
    assert "Beside other servers" not in to_markdown(report() | {"peers": {}})


def test_stored_page_is_made_from_the_stored_report() -> None:
    assert PAGE.read_text() == to_markdown(json.loads(RESULTS.read_text()))


def test_form_holds_the_file_whole() -> None:
    body, headers = to_form(b"\r\n--x\r\n")
    edge = headers["Content-Type"].partition("boundary=")[2].encode()
    assert body.startswith(b"--" + edge) and b"\r\n\r\n\r\n--x\r\n\r\n--" + edge in body
