"""Each system in a process of its own, which sleeps while another one is asked.

The threads of a system go on spinning for a while when their work is done, and would slow the next
one: so a process is stopped (SIGSTOP) as soon as it has answered, and every system keeps its own
defaults. This module imports nothing heavy: what a process weighs is its system's weight.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from validation.benchmark_systems import Job

MEL, SAMPLES, FEATURES = "mel.npy", "samples-{}.npy", "features-{}.npy"  # in the run's folder
PATIENCE = 10.0  # seconds that a process may take to end


class WorkerError(Exception):
    """A system has failed; the message is what it said, in one sentence."""


@dataclass(frozen=True)
class Answer:
    """seconds : that the call took; peak : bytes resident at most, so far, in the process"""

    seconds: float
    peak: int
    value: Any = None


def peak_memory() -> int:
    """The most that was resident in this process, in bytes.

    On Linux from /proc: what `getrusage` says there includes what the parent held when it started
    this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flushes_denormals() -> bool:
    """Whether the calling thread turns numbers below 1.2e-38 into 0."""
    import numpy as np

    return bool(np.float32(1e-39) * np.float32(0.5) == 0)


class Told:
    """What is raised inside, of whatever class and from whatever library, goes to the parent as
    one sentence, and the process ends."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception | SystemExit):
            return False
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        ours = type(error).__module__.split(".")[0] in ("weights", "encoder", "decoder_bridge")
        said = first if ours else f"{type(error).__name__}: {first}"
        self.pipe.send(WorkerError(said))
        return True


def work(pipe: Connection, job: Job) -> None:
    """The process: loads the system, then answers the calls that come, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.dup2(2, 1)  # what a library prints is no result
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    with Told(pipe):
        import numpy as np

        from validation.benchmark_systems import system

        model = system(job.system).load(job)
        pipe.send(Answer(0.0, peak_memory(), {"flushes_denormals": flushes_denormals()}))
        while (call := pipe.recv()) is not None:
            what, *arguments = call
            if what == "encoder":
                (batch,) = arguments
                mel = np.load(job.folder / MEL)[:batch]
                model.encoder(mel[:1])  # not timed: its memory and threads come from far
                began = time.perf_counter()
                features = model.encoder(mel)
                seconds = time.perf_counter() - began
                np.save(job.folder / FEATURES.format(job.system), features)
                value = None
            else:
                number, language = arguments
                audio = np.load(job.folder / SAMPLES.format(number))
                began = time.perf_counter()
                value = model.transcribe(audio, language)
                seconds = time.perf_counter() - began
            pipe.send(Answer(seconds, peak_memory(), value))


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """os.environ with these changes, which a process started inside inherits."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Worker:
    """The parent's handle of a system's process. Raises WorkerError once it has failed.

    start : seconds from an empty process to a system that is loaded
    """

    def __init__(self, job: Job, changes: Mapping[str, str] | None = None):
        self.name = job.system
        self._idle = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, job), daemon=True)
        began = time.perf_counter()
        with environment(changes or {}):
            self._process.start()
        theirs.close()
        with ExitStack() as failed:
            failed.callback(self.close)
            self.loaded = self._answer()
            failed.pop_all()
        self.start = time.perf_counter() - began
        self._stop()

    def ask(self, *call: Any) -> Answer:
        """Wake the process, let it do this, and put it to sleep again."""
        self._continue()
        try:
            self._pipe.send(call)
        except OSError as error:
            raise WorkerError(f"{self.name}: its process is gone") from error
        answer = self._answer()
        self._stop()
        return answer

    def _answer(self) -> Answer:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise WorkerError(ending(self._process.exitcode)) from error
        if isinstance(answer, WorkerError):
            raise answer
        assert isinstance(answer, Answer)
        return answer

    def _stop(self) -> None:
        """Stop the process and wait until all its threads stand, where the system can say so."""
        self._idle = True
        self._signal("SIGSTOP")
        if hasattr(os, "waitid") and self._process.pid is not None:
            with suppress(ChildProcessError):  # it has ended, and its status was read
                events = os.WSTOPPED | os.WEXITED | os.WNOWAIT
                os.waitid(os.P_PID, self._process.pid, events)

    def _continue(self) -> None:
        self._idle = False
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        """Nothing where the system has no such signals: there a process that waits goes on."""
        if hasattr(signal, name) and self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, getattr(signal, name))

    def close(self) -> None:
        """End the process: one that waits by asking it, one that is busy at once."""
        if self._idle and self._process.is_alive():
            self._continue()
            with suppress(OSError):  # it has just ended by itself
                self._pipe.send(None)
            self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def ending(status: int | None) -> str:
    """How a process ended that has not said why."""
    if status is not None and status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
