"""The synchronous client: `Client` and its `Job`. The decisions are in `giantleap_client.flows`."""

import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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

    def __init__(self, http: httpx.Client, flow: Flow[T]) -> None:
        self._http = http
        self._machine = Machine(flow)
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def advance(self) -> Event | Done[T]:
        """Run to the next event or the end."""
        step = self._machine.next()
        while not isinstance(step, Event | Done):
            step = self._machine.next(self._perform(step))
        return step

    def _perform(self, step: Open | Read | Pause) -> Outcome:
        try:
            match step:
                case Pause():
                    time.sleep(step.seconds_s)
                case Read():
                    return next(self._chunks, b"")
                case Open():
                    self.close()
                    self._response = self._http.send(
                        build(self._http, step), stream=True, follow_redirects=follows(step)
                    )
                    self._chunks = self._response.iter_bytes()
                    return to_head(self._response)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return to_cut(error)
        return None

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class Client:
    """A connection to one service, for any number of threads. Close it, or use it as a context manager.

    Args:
        url: Address of the service, with its path prefix if it has one.
        api_key: Key of the service.
        timeout_s: Longest wait of each method that is not given its own.
        retry: Whether a request is repeated after a lost connection or a 429 or 503, as long as the time allows.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 300.0, retry: bool = True) -> None:
        self._http = httpx.Client(**client_options(url, api_key))
        self.timeout_s = timeout_s
        self.retry = retry

    def __repr__(self) -> str:
        return f"Client({str(self._http.base_url)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, prompt: str, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]) -> Result:
        """Generate from a prompt.

        Raises:
            GiantleapError: It was refused, failed, or did not end in time, after which the service drops it.
        """
        return self.run(generate_request(prompt, **options), timeout_s=timeout_s)

    def upscale(self, source: Source, *, timeout_s: float | None = None, **options: Unpack[UpscaleOptions]) -> Result:
        """Enlarge a latent or an image: a path, bytes, an array, a tensor or a PIL image.

        Raises:
            GiantleapError: As `generate`.
            TypeError: The source cannot be sent.
        """
        return self.run(upscale_request(source, **options), timeout_s=timeout_s)

    def run(self, request: Request, *, timeout_s: float | None = None) -> Result:
        """Make a job of a request and wait for its files.

        Raises:
            GiantleapError: As `generate`.
        """
        return self._run(flows.run(request, str(uuid.uuid4()), self._timeout_s(timeout_s), retry=self.retry))

    def submit(self, request: Request, *, job_id: str | None = None, cancel_after_s: float | None = None) -> "Job":
        """Make a job, and return as soon as the service has it.

        Args:
            request: What to make.
            job_id: A UUID in lower case; the same id with the same request is the same job. Default: random.
            cancel_after_s: The job fails unless it has ended so long after it was accepted.

        Raises:
            GiantleapError: It was refused, or the service was not reached; `job_id` of the error is the job's id.
        """
        job = self.job(job_id or str(uuid.uuid4()))
        self._run(flows.make(request, job.id, self._deadline(), cancel_after_s))
        return job

    def job(self, job_id: str) -> "Job":
        """A job that exists."""
        return Job(self, job_id)

    def send(self, method: str, path: str, **params: str | int) -> bytes:
        """The body of a response of any other route, such as `client.send("GET", "models")`.

        Raises:
            GiantleapError: It was refused, or the service was not reached. A POST is not repeated.
        """
        return self._run(flows.send(method, path, params, self._deadline()))

    def map(
        self, requests: Iterable[Request], *, concurrency: int = 8, timeout_s: float | None = None
    ) -> Iterator[Result | GiantleapError]:
        """Run requests, some at a time; yields the result or the error of each, in their order.

        Takes the next request only when the caller has taken a result. When the caller stops early, it waits for those
        that run.
        """
        pool = ThreadPoolExecutor(concurrency)
        running: deque[Future[Result | GiantleapError]] = deque()
        try:
            for request in requests:
                running.append(pool.submit(self._run_or_error, request, timeout_s))
                if len(running) >= concurrency:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _timeout_s(self, given_s: float | None) -> float:
        return self.timeout_s if given_s is None else given_s

    def _deadline(self, timeout_s: float | None = None) -> Deadline:
        return Deadline.after(self._timeout_s(timeout_s), retry=self.retry)

    def _run_or_error(self, request: Request, timeout_s: float | None) -> Result | GiantleapError:
        try:
            return self.run(request, timeout_s=timeout_s)
        except GiantleapError as error:
            return error

    def _run(self, flow: Flow[T]) -> T:
        with closing(_Driver(self._http, flow)) as driver:
            while not isinstance(step := driver.advance(), Done):
                pass
            return step.value

    def _events(self, flow: Flow[None]) -> Iterator[Event]:
        with closing(_Driver(self._http, flow)) as driver:
            while isinstance(step := driver.advance(), Event):
                yield step


class Job:
    """A job of the service, by its id. Every method waits no longer than its time."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = check_job_id(job_id)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def show(self) -> JobBody:
        """The job as it is now: its status, queue position, stages, warnings and results."""
        return self._client._run(flows.show(self.id, self._client._deadline()))

    def events(self, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Its events from the first to `done`, through cut connections."""
        return self._client._events(flows.follow(self.id, self._client._deadline(timeout_s)))

    def result(self, *, timeout_s: float | None = None) -> Result:
        """Its files, once it has ended.

        Raises:
            JobFailed: It failed or was canceled.
            Timeout: It has not ended in time, and goes on; or its own deadline has passed.
        """
        return self._client._run(flows.result(self.id, self._client._deadline(timeout_s)))

    def cancel(self) -> JobBody:
        """Cancel it.

        Raises:
            GiantleapError: It has ended (code `conflict`).
        """
        return self._client._run(flows.cancel(self.id, self._client._deadline()))

    def delete(self) -> bool:
        """Delete it with its files where it has ended, and cancel it where it has not; whether it is deleted.

        Raises:
            GiantleapError: There is none (code `not_found`), which is also what a repeat after a lost answer finds.
        """
        return self._client._run(flows.delete(self.id, self._client._deadline()))
