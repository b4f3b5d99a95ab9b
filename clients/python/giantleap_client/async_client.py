"""The asynchronous client: `AsyncClient` and its `AsyncJob`, with the methods of `giantleap_client.client`."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

import httpx

from giantleap_client import flows
from giantleap_client.calls import Request, check_job_id, generate_request, upscale_request
from giantleap_client.errors import GiantleapError
from giantleap_client.events import Event
from giantleap_client.flows import Deadline, Done, Flow, JobBody, Machine, Open, Outcome, Pause, Read
from giantleap_client.options import GenerateOptions, UpscaleOptions
from giantleap_client.payloads import Result, Source
from giantleap_client.transport import build, client_options, follows, to_cut, to_head

T = TypeVar("T")


class _Driver(Generic[T]):
    """Performs the steps of one flow."""

    def __init__(self, http: httpx.AsyncClient, flow: Flow[T]) -> None:
        self._http = http
        self._machine = Machine(flow)
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def advance(self) -> Event | Done[T]:
        """Run to the next event or the end."""
        step = self._machine.next()
        while not isinstance(step, Event | Done):
            step = self._machine.next(await self._perform(step))
        return step

    async def _perform(self, step: Open | Read | Pause) -> Outcome:
        try:
            match step:
                case Pause():
                    await asyncio.sleep(step.seconds_s)
                case Read():
                    assert self._chunks is not None
                    return await anext(self._chunks, b"")
                case Open():
                    await self.aclose()
                    self._response = await self._http.send(
                        build(self._http, step), stream=True, follow_redirects=follows(step)
                    )
                    self._chunks = self._response.aiter_bytes()
                    return to_head(self._response)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return to_cut(error)
        return None

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()
            self._response = None


class AsyncClient:
    """A connection to one service, for one event loop. The arguments are those of `giantleap_client.Client`."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 300.0, retry: bool = True) -> None:
        self._http = httpx.AsyncClient(**client_options(url, api_key))
        self.timeout_s = timeout_s
        self.retry = retry

    def __repr__(self) -> str:
        return f"AsyncClient({str(self._http.base_url)!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """Generate from a prompt."""
        return await self.run(generate_request(prompt, **options), timeout_s=timeout_s)

    async def upscale(
        self, source: Source, *, timeout_s: float | None = None, **options: Unpack[UpscaleOptions]
    ) -> Result:
        """Enlarge a latent or an image; reading and encoding it runs in a thread."""
        request = await asyncio.to_thread(upscale_request, source, **options)
        return await self.run(request, timeout_s=timeout_s)

    async def run(self, request: Request, *, timeout_s: float | None = None) -> Result:
        """Make a job of a request and wait for its files."""
        return await self._run(flows.run(request, str(uuid.uuid4()), self._timeout_s(timeout_s), retry=self.retry))

    async def submit(
        self, request: Request, *, job_id: str | None = None, cancel_after_s: float | None = None
    ) -> "AsyncJob":
        """Make a job, and return as soon as the service has it."""
        job = self.job(job_id or str(uuid.uuid4()))
        await self._run(flows.make(request, job.id, self._deadline(), cancel_after_s))
        return job

    def job(self, job_id: str) -> "AsyncJob":
        """A job that exists."""
        return AsyncJob(self, job_id)

    async def send(self, method: str, path: str, **params: str | int) -> bytes:
        """The body of a response of any other route."""
        return await self._run(flows.send(method, path, params, self._deadline()))

    async def map(
        self, requests: Iterable[Request], *, concurrency: int = 8, timeout_s: float | None = None
    ) -> AsyncGenerator[Result | GiantleapError]:
        """Run requests, some at a time; yields the result or the error of each, in their order."""
        running: deque[asyncio.Task[Result | GiantleapError]] = deque()
        try:
            for request in requests:
                running.append(asyncio.create_task(self._run_or_error(request, timeout_s)))
                if len(running) >= concurrency:
                    yield await running.popleft()
            while running:
                yield await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _timeout_s(self, given_s: float | None) -> float:
        return self.timeout_s if given_s is None else given_s

    def _deadline(self, timeout_s: float | None = None) -> Deadline:
        return Deadline.after(self._timeout_s(timeout_s), retry=self.retry)

    async def _run_or_error(self, request: Request, timeout_s: float | None) -> Result | GiantleapError:
        try:
            return await self.run(request, timeout_s=timeout_s)
        except GiantleapError as error:
            return error

    async def _run(self, flow: Flow[T]) -> T:
        async with aclosing(_Driver(self._http, flow)) as driver:
            while not isinstance(step := await driver.advance(), Done):
                pass
            return step.value

    async def _events(self, flow: Flow[None]) -> AsyncGenerator[Event]:
        async with aclosing(_Driver(self._http, flow)) as driver:
            while isinstance(step := await driver.advance(), Event):
                yield step


class AsyncJob:
    """A job of the service, by its id. Every method waits no longer than its time."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client = client
        self.id = check_job_id(job_id)

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    async def show(self) -> JobBody:
        """The job as it is now."""
        return await self._client._run(flows.show(self.id, self._client._deadline()))

    def events(self, *, timeout_s: float | None = None) -> AsyncGenerator[Event]:
        """Its events from the first to `done`, through cut connections."""
        return self._client._events(flows.follow(self.id, self._client._deadline(timeout_s)))

    async def result(self, *, timeout_s: float | None = None) -> Result:
        """Its files, once it has ended."""
        return await self._client._run(flows.result(self.id, self._client._deadline(timeout_s)))

    async def cancel(self) -> JobBody:
        """Cancel it."""
        return await self._client._run(flows.cancel(self.id, self._client._deadline()))

    async def delete(self) -> bool:
        """Delete it with its files where it has ended, and cancel it where it has not; whether it is deleted."""
        return await self._client._run(flows.delete(self.id, self._client._deadline()))
