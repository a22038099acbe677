"""The step store: a step is a pure function of (frozen config, input artifacts, seed) that fills one directory.

A step's directory is named by a fingerprint of everything it depends on. Work happens in a `.partial` sibling that
survives a kill, so that a step can continue from its own checkpoint or shard; `manifest.json` is written last and the
directory renamed: an artifact either is whole or does not exist.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from sicog_exp import interruption

MANIFEST = "manifest.json"
SCRATCH = "scratch"
"""Sub-directory of a partial artifact for checkpoints and shards; removed when the step is done."""
CLOCK = "seconds"
"""File of scratch with the seconds that the step has taken, over all attempts."""
FULL_BELOW = 1_000_000
"""Free bytes under which a failed write is blamed on the disk."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of writes for which there is no room."""
RECORDED_LIBRARIES = ("sicog-exp", "torch", "transformers", "lightning", "lmms-eval", "datasets", "numpy")


class StoreError(RuntimeError):
    """A step that could not be stored; the message says which and what to do."""


def canonical(value: Any) -> str:
    """Canonical JSON. Raises TypeError on anything without one exact form (sets, objects, NaN)."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # what only says where or how fast a step computes is marked by its field, and is no part of what it makes
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
                if f.metadata.get("identity", True)}  # fmt: skip
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys must be strings to be fingerprinted, got {list(value)!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value} has no canonical form; use a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form; use dataclasses, mappings, lists, numbers, strings")


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file, the manifest and scratch excluded."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    relative = [(p, p.relative_to(directory)) for p in files]
    return {str(r): file_checksum(p) for p, r in relative if str(r) != MANIFEST and r.parts[0] != SCRATCH}


REJECTED = "rejected.jsonl"
"""What a step read, drew or asked in vain and left out, with the reasons: a file of its artifact."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Artifact:
    """A finished step's directory. `fingerprint` names what it was made of, `content` hashes what it holds."""

    path: Path
    manifest: Mapping[str, Any]
    cached: bool
    """True when this process found the step finished instead of running it."""

    @property
    def name(self) -> str:
        return self.manifest["step"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def facts(self) -> Mapping[str, float]:
        """What the step measured while it ran.

        `seconds` and `earlier_seconds` (those of attempts that were killed), `peak_mb` and `peak_gpu_mb` of every step;
        of one whose batches did not fit into memory `halved_batches`, of one with prompts that its model cannot carry
        `rejected`;
        of one that a model computes `samples`, `tokens` (`prompt_tokens`, of which `image_tokens`, and `new_tokens`:
        sampled ones or those that training predicts), `flops` and `model_seconds`, all of the work that was kept.
        """
        return self.manifest["facts"]

    @property
    def device(self) -> str:
        """What computed the step."""
        return self.manifest.get("device", "")

    @property
    def content(self) -> str:
        return digest_of(self.manifest["outputs"])

    def __truediv__(self, name: str) -> Path:
        return self.path / name


@dataclass
class Workplace:
    """Where a running step works, and what it reports for its manifest."""

    directory: Path
    """The outputs."""
    scratch: Path
    """What only a continued run of this step needs."""
    facts: dict[str, float] = field(default_factory=dict)
    """Measured numbers for the manifest: tokens, samples, flops, model_seconds, ..."""
    progress: Progress | None = None
    """Called with (done, total) as the step advances."""
    tracked_run: str = ""
    """The tracking run that watches this step, empty without one."""
    device: str = "CPU"
    """What computes; a step that runs a model says so in more detail."""

    def add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self.facts[name] = self.facts.get(name, 0) + number


@dataclass(frozen=True)
class Step:
    """What is to be done: `run(config, inputs, workplace)` fills the workplace's directory.

    `revision` is raised when the code's meaning changes, so that artifacts of older code are not reused.
    """

    name: str
    run: Callable[[Any, Mapping[str, Artifact], Workplace], None]
    config: Any
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    seed: int = 0
    revision: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        inputs = {name: artifact.fingerprint for name, artifact in self.inputs.items()}
        config = _plain(self.config)
        return {"step": self.name, "revision": self.revision, "config": config, "inputs": inputs, "seed": self.seed}

    @property
    def fingerprint(self) -> str:
        return digest_of(self.identity)


class Store:
    """Runs steps under `root`; one directory a step. Safe for several processes on one file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store={root}: {error.strerror}; name a folder that can be made or written") from None

    def path_of(self, step: Step) -> Path:
        return self.root / f"{step.name}-{step.fingerprint}"

    def find(self, step: Step) -> Artifact | None:
        """The finished artifact of a step, or None. A damaged one is moved aside, so that it is made again."""
        path = self.path_of(step)
        if not path.is_dir():
            return None
        return self._read(path) if self.check(path.name) else None

    def read(self, name: str) -> Artifact:
        """The artifact directory `name`, which a finished step left."""
        return self._read(self.root / name)

    @staticmethod
    def _read(path: Path) -> Artifact:
        return Artifact(path, json.loads((path / MANIFEST).read_text()), cached=True)

    def set_aside(self, path: Path, reason: str) -> None:
        """Move an artifact out of the way, so that its step runs again; nothing is deleted."""
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(aside)
        print(f"store: {path.name} is damaged ({reason}); moved to {aside.name}, the step runs again")

    def check(self, name: str) -> bool:
        """Whether the artifact directory `name` is whole; a damaged one is moved aside."""
        path = self.root / name
        if not path.is_dir() or self._damage(path) is None:
            return path.is_dir()
        # Another process may be moving and remaking it just now: only who holds its lock may say that it is damaged.
        with self._lock(path):
            return self._whole(path)

    def _whole(self, path: Path) -> bool:
        damage = self._damage(path)
        if damage and path.is_dir():
            self.set_aside(path, damage)
        return damage is None

    def run(self, step: Step, progress: Progress | None = None, tracked_run: str = "") -> Artifact:
        """The step's artifact, made now unless it exists. Raises StoreError when the disk is full, or the store another
        user's alone."""
        path = self.path_of(step)
        with self._lock(path):
            return self._read(path) if self._whole(path) else self._make(step, progress, tracked_run)

    def _make(self, step: Step, progress: Progress | None, tracked_run: str) -> Artifact:
        interruption.check()
        partial = _sibling(self.path_of(step), ".partial")
        scratch = partial / SCRATCH
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            clock = _Clock(scratch / CLOCK, progress)
            workplace = Workplace(partial, scratch, progress=clock.advance, tracked_run=tracked_run)
            _reset_peaks()
            with clock:
                step.run(step.config, step.inputs, workplace)
            if workplace.facts.get("model_seconds"):
                free_memory()
            largest = {name: max(value, workplace.facts.get(name, 0)) for name, value in peaks().items()}
            facts = {**workplace.facts, **clock.facts(), **largest}
            manifest = {**step.identity, "fingerprint": step.fingerprint, "outputs": checksums(partial),
                        "facts": facts, "device": workplace.device, "made_by": tracked_run,
                        **_environment()}  # fmt: skip
            self._publish(partial, self.path_of(step), manifest)
        except StoreError:  # of a step inside this one
            raise
        except Exception as error:
            if disk_full(error, self.root):
                raise StoreError(f"disk full while step {step.name} wrote to {partial} ({_room(error, self.root)}): "
                                 "free some space and run the same command again; it continues") from error
            raise
        return Artifact(self.path_of(step), manifest, cached=False)

    @staticmethod
    def _publish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        for file in partial.rglob("*"):
            _let_read(file, final.parent)
            _fsync(file)
        text = json.dumps(manifest, indent=1, sort_keys=True)
        # Scratch is no output: a manifest half written there by a killed run is never taken for one.
        temporary = partial / SCRATCH / MANIFEST
        temporary.write_text(text)
        _fsync(temporary)
        temporary.rename(partial / MANIFEST)
        shutil.rmtree(partial / SCRATCH)
        _fsync(partial)
        partial.rename(final)
        _fsync(final.parent)

    @staticmethod
    def _damage(path: Path) -> str | None:
        """What is wrong with an artifact, or None."""
        try:
            expected = dict(json.loads((path / MANIFEST).read_text())["outputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{MANIFEST}: {error}"
        try:
            actual = checksums(path)
        except OSError as error:
            return str(error)
        wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        return f"{', '.join(wrong[:3])} changed, missing or added" if wrong else None

    @contextmanager
    def _lock(self, artifact: Path) -> Iterator[None]:
        """One process at a time on one step; the kernel frees a dead owner's lock. The file names the owner."""
        with _shared_as(self.root), self._lock_file(_sibling(artifact, ".lock")) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().decode().strip() or "?"
                print(f"store: waiting for {artifact.name}, which process {owner} is running")
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(OSError):  # on a full disk the lock holds without its owner's name
                file.seek(0)
                file.truncate()
                file.write(str(os.getpid()).encode())
            yield

    def _lock_file(self, path: Path) -> IO[bytes]:
        try:
            # O_CREAT on another user's file is refused in some shared folders (sysctl fs.protected_regular)
            descriptor = os.open(path, os.O_RDWR | (0 if path.exists() else os.O_CREAT), 0o666)
            return os.fdopen(descriptor, "r+b", buffering=0)
        except PermissionError:
            raise StoreError(f"{path}: user {os.getuid()} may not write there. Let the owner share the store, once: "
                             f"chgrp -R GROUP {self.root}; chmod -R g+rwX {self.root}; find {self.root} -type d -exec "
                             "chmod g+s {} +; or name a store of your own") from None  # fmt: skip
        except OSError as error:
            if disk_full(error, self.root):
                raise StoreError(f"disk full: {path} cannot be made ({_room(error, self.root)}); free some space and "
                                 "run the same command again; it continues") from error  # fmt: skip
            raise


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether a full disk, a quota or a limit on a file's size is behind the error or its causes; torch's, safetensors'
    and SQLite's writers raise errors of their own."""
    if error is None:
        return False
    if getattr(error, "errno", None) in FULL or "database or disk is full" in str(error):
        return True
    full = not isinstance(error, OSError) and shutil.disk_usage(folder).free < FULL_BELOW
    return full or disk_full(error.__cause__ or error.__context__, folder)


def _room(error: BaseException, folder: Path) -> str:
    """What there is, and what there is not."""
    if getattr(error, "errno", None) == errno.EFBIG:
        return f"a file reached the process's limit of {resource.getrlimit(resource.RLIMIT_FSIZE)[0] / 1e6:.1f} MB"
    if "database or disk is full" in str(error):
        return "the tracking store's"
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"


@contextmanager
def _shared_as(root: Path) -> Iterator[None]:
    """Inside, what is made is the group's as much as the root is: who continues another user's step writes in it."""
    mode = root.stat().st_mode
    group = mode & stat.S_IRWXG if mode & stat.S_IWGRP else 0
    before = os.umask(0o077)
    os.umask(before & ~group)
    try:
        yield
    finally:
        os.umask(before)


def _let_read(file: Path, root: Path) -> None:
    """Who can read the store can read the file: some libraries write files that only their owner can."""
    found = file.stat()
    if found.st_uid == os.getuid():
        file.chmod(stat.S_IMODE(found.st_mode) | root.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Clock:
    """A step's seconds over all its attempts, kept in scratch as it advances: a killed attempt cannot say its own."""

    def __init__(self, file: Path, progress: Progress | None) -> None:
        self._file, self._progress = file, progress
        self._earlier = float(file.read_text()) if file.exists() else 0.0
        self._started = time.time()

    def __enter__(self) -> None:
        self._started = time.time()

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk has been said already
            self._keep()

    def advance(self, done: int, total: int) -> None:
        self._keep()
        interruption.check()
        if self._progress:
            self._progress(done, total)

    def facts(self) -> dict[str, float]:
        return {"seconds": self._seconds, **({"earlier_seconds": self._earlier} if self._earlier else {})}

    @property
    def _seconds(self) -> float:
        return self._earlier + time.time() - self._started

    def _keep(self) -> None:
        temporary = self._file.with_suffix(".part")
        temporary.write_text(str(self._seconds))
        temporary.replace(self._file)


def _reset_peaks() -> None:
    """Let the largest memory so far be that of now, where the kernel allows it; else it stays the process's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    gpus = _gpus()
    for i in range(gpus.device_count() if gpus else 0):
        gpus.reset_peak_memory_stats(i)


def peaks() -> dict[str, float]:
    """The largest resident memory since `_reset_peaks` (Linux counts it in KB), and that of the fullest GPU, in MB."""
    peaks, gpus = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}, _gpus()
    on_gpu = max((gpus.max_memory_allocated(i) for i in range(gpus.device_count())), default=0) if gpus else 0
    return {**peaks, **({"peak_gpu_mb": on_gpu / 1e6} if on_gpu else {})}


def free_memory() -> None:
    """Gives back what nothing holds any more, GPU memory too. Trainers and engines hold their models in cycles, which
    stay until Python happens to look for some; who comes next needs the room now."""
    gc.collect()
    gpus = _gpus()
    if gpus:
        gpus.empty_cache()


def _gpus() -> Any:
    """torch.cuda where this process uses it; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def _environment() -> dict[str, Any]:
    versions = {}
    for library in RECORDED_LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"libraries": versions, "python": platform.python_version(), "machine": platform.machine()}
