"""hydra/launcher=peftlab_workers: jobs in processes of this machine that live for a whole study.

A worker runs one job after another, so that what a job leaves loaded is there for the next. It
dies with the process that started it; a worker that dies costs the job it was at, and is replaced.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from peftlab.errors import require
from peftlab.trial import Interrupted

STOP_S = 5.0  # a worker whose pipe is closed is given so long to end


class WorkersLauncher(Launcher):
    """Launches jobs in `n_jobs` worker processes, from any thread."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra hands to a launcher; the first job of a worker starts it.

        Raises: InputError unless n_jobs is at least 1.
        """
        whole = isinstance(self.n_jobs, int) and self.n_jobs >= 1
        require(whole, "hydra.launcher.n_jobs", self.n_jobs, "a whole number, at least 1")
        self.config = config
        self.hydra = (hydra_context, task_function, config)
        self.idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.n_jobs):
            self.idle.put(None)  # a worker that is still to be started
        self.workers: list[Worker] = []
        self.lock = threading.Lock()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs side by side; a job whose worker died returns as failed.

        Raises: Interrupted if a job was told to stop.
        """
        jobs = [(list(words), initial_job_idx + n) for n, words in enumerate(job_overrides)]
        if len(jobs) == 1:
            return [self._run(*jobs[0])]
        with ThreadPoolExecutor(self.n_jobs) as pool:
            return list(pool.map(lambda job: self._run(*job), jobs))

    def _run(self, overrides: list[str], number: int) -> JobReturn:
        worker = self.idle.get()
        try:
            if worker is None:
                with self.lock:
                    worker = Worker(len(self.workers), self.n_jobs, *self.hydra)
                    self.workers.append(worker)
            result = worker.run(overrides, number)
        finally:
            alive = worker is not None and worker.process.is_alive()
            self.idle.put(worker if alive else None)
        if isinstance(result, Interrupted):
            raise result
        return result

    def interrupt(self, times: int) -> None:
        """Tell running jobs to stop: politely, then at once, then by killing them."""
        for worker in self.workers:
            worker.interrupt(signal.SIGINT if times < 3 else signal.SIGKILL)

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.close()


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of a job."""


class Worker:
    """One process, as its launcher sees it."""

    def __init__(
        self,
        index: int,
        n_workers: int,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
    ) -> None:
        spawn = get_context("spawn")  # a fork would copy threads' locks in whatever state
        self.pipe, theirs = spawn.Pipe()
        log = Path(config.hydra.sweep.dir).absolute() / f"worker-{index}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        search_path = context.config_loader.get_search_path()
        hydra = pickle.dumps((_state(), _stored(), search_path, task, config))
        # daemon: ended with this process, should it end in an orderly way without close()
        self.process = spawn.Process(
            target=_serve, args=(theirs, hydra, log, n_workers), daemon=True
        )
        self.process.start()
        theirs.close()
        self.busy = False

    def run(self, overrides: list[str], number: int) -> JobReturn | Interrupted:
        """Run a job there and wait for it."""
        self.busy = True
        try:
            self.pipe.send((overrides, number))
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(STOP_S)
            error = WorkerDied(f"the worker died (exit code {self.process.exitcode})")
            return JobReturn(overrides, status=JobStatus.FAILED, _return_value=error)
        finally:
            self.busy = False

    def interrupt(self, number: int) -> None:
        """Send a signal to the process if it runs a job."""
        if self.busy and self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def close(self) -> None:
        """Close the pipe, which ends the process."""
        self.pipe.close()
        self.process.join(STOP_S)


def _state() -> dict[type, Any]:
    """Return what a worker cannot find by itself, such as the app's name and version.

    HydraConfig is that of the last job in this process, if any; a worker's jobs have their own.
    """
    own = (Plugins, SourcesRegistry, GlobalHydra, ConfigStore, HydraConfig)
    return {kind: one for kind, one in Singleton._instances.items() if kind not in own}


def _stored() -> list[bytes]:
    """Return the configs that this app has stored, pickled.

    A worker finds those of plugins by itself. They may even be impossible to pickle: where Hydra
    has looked for plugins twice, a stored config is of a class that its module has replaced.
    """
    found = []
    left: list[Any] = [ConfigStore.instance().repo]
    while left:
        entry = left.pop()
        if isinstance(entry, dict):
            left.extend(entry.values())
            continue
        with contextlib.suppress(pickle.PicklingError):
            found.append(pickle.dumps(entry))
    return found


def _serve(pipe: Connection, hydra: bytes, log: Path, n_workers: int) -> None:
    """Run in the worker: take jobs from the pipe until it is closed."""
    # Before torch is loaded: workers that all take every core wait for each other most of the time.
    share = max(1, len(os.sched_getaffinity(0)) // n_workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.setpgid(0, 0)  # Ctrl-C on the terminal reaches the sweeper, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("a") as file:  # side by side on one terminal, output would be unreadable
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    setup_globals()
    Plugins.instance()  # a worker finds the plugins itself
    state, stored, search_path, task, config = pickle.loads(hydra)
    Singleton._instances.update(state)
    for entry in map(pickle.loads, stored):
        ConfigStore.instance().store(
            entry.name, entry.node, entry.group, entry.package, entry.provider
        )
    context = HydraContext(ConfigLoaderImpl(search_path), Callbacks(config))
    jobs: queue.Queue[tuple[list[str], int]] = queue.Queue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    while True:
        overrides, number = jobs.get()
        pipe.send_bytes(_job(context, task, config, overrides, number))


def _receive(pipe: Connection, jobs: queue.Queue) -> None:
    """Pass jobs on; when the sweeper is gone, even by SIGKILL, end at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(pipe.recv())
    os._exit(0)


def _job(
    context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    overrides: list[str],
    number: int,
) -> bytes:
    """Run one job; return what Hydra returned, or Interrupted, ready to be sent."""
    job = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    HydraConfig.instance().set_config(job)
    result: Any
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run_job(
            hydra_context=context,
            task_function=task,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except (KeyboardInterrupt, SystemExit) as stop:  # Halted is a SystemExit
        result = Interrupted(f"job {number}: {type(stop).__name__}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        return pickle.dumps(result)
    except (pickle.PicklingError, TypeError, AttributeError):  # an exception that cannot travel
        error = RuntimeError(f"{type(result._return_value).__name__}: {result._return_value}")
        return pickle.dumps(JobReturn(overrides, status=JobStatus.FAILED, _return_value=error))
