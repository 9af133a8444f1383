"""Where the parts of a study run: in this process, in several of this machine, or on a Ray cluster.

The files that they leave are the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import re
import socket
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pydantic import Field

from pruneforge.errors import PruneForgeError, UnfinishedError, unknown_name
from pruneforge.interfaces import options
from pruneforge.interfaces.options import Configurable
from pruneforge.plugins import loaded_plugins
from pruneforge.studies.cells import Found, Work
from pruneforge.studies.folder import StudyFolder


class Executor(Configurable, ABC):
    """Runs the parts of a study."""

    @abstractmethod
    def run(self, parts: Sequence[Work], held: StudyFolder) -> Iterator[str]:
        """Run the parts, keep what they find in the folder, and yield where each file is below it, once it is there.

        Raises:
            PruneForgeError: A dense model cannot be evaluated, or the machinery fails; what is finished stays.
        """


class Local(Executor):
    """This process, or `workers` processes of this machine, among which its cores and GPUs are divided."""

    class Options(options.Options):
        """Options of the local executor."""

        workers: int = Field(1, ge=1, description="processes that work side by side")

    options: Options

    def run(self, parts: Sequence[Work], held: StudyFolder) -> Iterator[str]:
        """Run the parts one after another, or several at a time."""
        if self.options.workers == 1 or len(parts) <= 1:
            for part in parts:
                yield from _kept(part, held)
            return
        count = min(self.options.workers, len(parts))
        spawn = multiprocessing.get_context("spawn")  # a forked process can use neither CUDA nor threads
        devices = spawn.Queue()
        for index in range(count):
            devices.put(index)
        others = set(multiprocessing.active_children())  # of the program that calls this
        pool = ProcessPoolExecutor(count, spawn, _begin, (devices, count, _plugin_files()))
        try:
            waiting = [pool.submit(_keep_all, part, held.path, count) for part in parts]
            for future in as_completed(waiting):
                yield from future.result()
        except BrokenProcessPool:
            raise UnfinishedError(
                "a process of the study ended, maybe killed for want of memory; run it again with fewer workers: "
                "what is finished stays (a script that calls this needs `if __name__ == '__main__':`)"
            ) from None
        finally:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # after an interruption or a failure some still work
            pool.shutdown(cancel_futures=True)


def _begin(devices: Any, workers: int, files: Sequence[str]) -> None:
    """Prepare a process: its share of the cores, a GPU of its own if there are any, and the plugins."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    index = devices.get()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())]
    if visible is not None:  # as CUDA reads it, up to the first that is none
        names = list(itertools.takewhile(lambda name: name not in ("", "-1"), visible.split(",")))
    if names:  # read when CUDA is first used, in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = names[index % len(names)]
    _load_plugins(files)


def _end_with_parent() -> None:
    """End this process once the one that started it is gone, which could not tell it to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _keep_all(part: Work, folder: Path, sharing: int) -> list[str]:
    """Run a part in another process, and return where its files are."""
    return list(_kept(part, StudyFolder(folder), sharing))


def _kept(part: Work, held: StudyFolder, sharing: int = 1) -> Iterator[str]:
    with held.work() as work:
        for place, content in part.run(work, sharing):
            held.keep(place, content)
            yield place


class OnRay(Executor):
    """A Ray cluster; each part is a task of its own, and what it finds comes back to this machine.

    Every node needs PruneForge with the same versions, and the models and data under the same names.
    """

    class Options(options.Options):
        """Options of the Ray executor."""

        address: str | None = Field(
            None, description="cluster to join; by default the one that RAY_ADDRESS names, or else a new one here"
        )
        num_cpus: float = Field(1, gt=0, description="cores that a part asks for")
        num_gpus: float | None = Field(
            None, ge=0, description="GPUs that a part asks for; by default one if the cluster has any"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        """Take the options.

        Raises:
            PruneForgeError: An option is wrong, or Ray is not installed.
        """
        super().__init__(**options)
        if importlib.util.find_spec("ray") is None:
            raise PruneForgeError("the executor 'ray' needs ray; install the extra 'ray' (pip install '.[ray]')")

    def run(self, parts: Sequence[Work], held: StudyFolder) -> Iterator[str]:
        """Hand the parts to the cluster, and keep what comes back as it comes."""
        ray: Any = importlib.import_module("ray")
        joined = ray.is_initialized()
        if not joined:
            address = self.options.address
            try:
                _check_address(address)
                ray.init(address=address, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise PruneForgeError(f"no Ray cluster at {address!r}: {reason}") from error
        try:
            # Not retried: what had come back would be made again. The next run of the study makes what is missing.
            task = ray.remote(num_returns="streaming", max_retries=0, **self._resources(ray))(_found_there)
            streams = [task.remote(part, _plugin_files()) for part in parts]
            yield from self._arriving(ray, streams, held)
        finally:
            if not joined:
                ray.shutdown()

    def _resources(self, ray: Any) -> dict[str, float]:
        """Return what each part asks for.

        Raises:
            PruneForgeError: No node has as much, so that all would wait for ever.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.options.num_gpus
        if gpus is None:
            gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        for name, kind, asked in (("num_cpus", "CPU", self.options.num_cpus), ("num_gpus", "GPU", gpus)):
            most = max((node.get(kind, 0) for node in nodes), default=0)
            if asked > most:
                raise PruneForgeError(f"{name}={asked:g}, and no node of the Ray cluster has more than {most:g}")
        return {"num_cpus": self.options.num_cpus, "num_gpus": gpus}

    def _arriving(self, ray: Any, streams: list[Any], held: StudyFolder) -> Iterator[str]:
        try:
            while streams:
                ready, _ = ray.wait(streams, num_returns=1)
                for stream in ready:
                    try:
                        place, content = ray.get(next(stream))
                    except StopIteration:
                        streams.remove(stream)
                        continue
                    held.keep(place, content)
                    yield place
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PruneForgeError):
                raise error.cause from None
            raise PruneForgeError(f"a part of the study failed: {' '.join(str(error.cause).split())}") from error
        except ray.exceptions.RayError as error:
            raise UnfinishedError(
                f"the Ray cluster failed: {' '.join(str(error).split())[:200]}; run the study again: what is finished "
                "stays"
            ) from error


def _check_address(address: str | None) -> None:
    """Raise where an address is of a kind that does not serve, or nothing listens at `host:port`.

    Raises:
        ValueError: It is of Ray's client, which cannot hand back what is found as it comes.
        OSError: Nobody listens; Ray would try for minutes.
    """
    if address is not None and address.startswith("ray://"):
        raise ValueError("a client's address does not serve; run this on a node of the cluster, with HOST:PORT")
    host, colon, port = (address or "").rpartition(":")
    if colon and re.fullmatch("[0-9]{1,5}", port):
        socket.create_connection((host, int(port)), timeout=10).close()


def _found_there(part: Work, files: Sequence[str]) -> Iterator[Found]:
    """Run a part in a process of Ray's."""
    _load_plugins(files)
    # In a folder of all such processes of the node and user, so that what killed ones leave is found and removed.
    place = Path(tempfile.gettempdir(), f"pruneforge-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise PruneForgeError(f"{str(place)!r} belongs to somebody else; set TMPDIR to a folder of your own")
    with StudyFolder(place).work() as work:
        # Ray sends values into the generator, which `yield from` would hand on to iterators that take none.
        for found in part.run(work):  # noqa: UP028
            yield found


def _plugin_files() -> list[str]:
    return [plugin.origin for plugin in loaded_plugins().loaded if plugin.from_file]


def _load_plugins(files: Sequence[str]) -> None:
    for file in files:
        loaded_plugins().load_file(file)


EXECUTORS: dict[str, type[Executor]] = {"local": Local, "ray": OnRay}
"""Where a study may run, by name."""


def make_executor(name: str, **options: Any) -> Executor:
    """Return the executor of a name.

    Raises:
        PruneForgeError: There is none of that name, it has no such option, or what it needs is not installed.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    kind = EXECUTORS[name]
    made = kind.__new__(kind)
    made.name = name
    made.__init__(**options)  # type: ignore[misc]
    return made
