"""The run directory: its layout, and the manifests that say what in it is complete.

A step of a stage is complete when its record `steps/<step>.json` exists and the files it names still have
the recorded hashes; a stage is committed when `stage.json` exists. Both are written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cl.errors import InputError
from llava_cl.parsing import read_text
from llava_cl.store.files import file_hash, json_object, json_text, read_json, verify_files, write_json, write_text

FORMAT = 1

LIVE_LOG = "log.jsonl"
"""Rows of the training under way, in the Trainer's scratch folder; after a resume some steps are there twice."""


class StageDirectory:
    """One stage's files below `stages/`. Stage 0 is the untouched base model."""

    def __init__(self, path: Path, stage: int, task: str) -> None:
        self.path = path
        self.stage = stage
        self.task = task

    @property
    def adapter(self) -> Path:
        """Folder of the stage's adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def moments(self) -> Path:
        """Running second moments of the layers' inputs, where the method uses them."""
        return self.path / "moments.safetensors"

    @property
    def initial_factors(self) -> Path:
        """LoRA factors before training."""
        return self.path / "initial_factors.safetensors"

    @property
    def subspace(self) -> Path:
        """The columns that this stage added to the basis of each layer, `[in, j]` fp32."""
        return self.path / "subspace.safetensors"

    @property
    def predictions(self) -> Path:
        """Folder of the raw predictions, one JSON Lines file a task."""
        return self.path / "predictions"

    @property
    def scores(self) -> Path:
        """Scores of all tasks evaluated at this stage."""
        return self.path / "scores.json"

    @property
    def train_log(self) -> Path:
        """Loss and learning rate of every optimizer step."""
        return self.path / "train_log.jsonl"

    @property
    def timings(self) -> Path:
        """Seconds and peak memory of every step, and samples and tokens a second of training."""
        return self.path / "timings.json"

    @property
    def checkpoints(self) -> Path:
        """Scratch folder of the Trainer's resume points, removed when training is complete."""
        return self.path / "checkpoints"

    @property
    def live_log(self) -> Path:
        """What `train_log` will hold, while the stage is being trained."""
        return self.checkpoints / LIVE_LOG

    @property
    def manifest(self) -> Path:
        """`stage.json`, whose existence means that the stage is committed."""
        return self.path / "stage.json"

    def _record(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def step_done(self, step: str) -> bool:
        """Whether a step is complete and its files are as recorded.

        Raises:
            InputError: the step was recorded but a file is missing or has changed since.
        """
        record = self._record(step)
        if not record.is_file():
            return False
        self._verify_files(read_json(record, "files")["files"])
        return True

    def record_step(self, step: str, files: Iterable[Path], **facts: Any) -> None:
        """Declares a step complete; call it after its files are written."""
        hashes = {str(file.relative_to(self.path)): file_hash(file) for file in sorted(files)}
        write_json(self._record(step), {"format": FORMAT, "step": step, "files": hashes, **facts})

    @property
    def trained(self) -> bool:
        """Whether the model after this stage can be put together: its adapter is complete, or it needs none."""
        return self.stage == 0 or self.step_done("train")

    def facts(self, step: str) -> dict[str, Any] | None:
        """What was recorded with a step, None if it is not complete."""
        record = self._record(step)
        return dict(read_json(record)) if record.is_file() else None

    def step_facts(self) -> list[dict[str, Any]]:
        """What was recorded with every complete step."""
        return [dict(read_json(record)) for record in sorted((self.path / "steps").glob("*.json"))]

    def commit(self, follows: str) -> None:
        """Writes `stage.json` with the hashes of all recorded files and of the records themselves.

        Args:
            follows: digest of what the stage was computed from, see `RunDirectory.before`.
        """
        files: dict[str, str] = {}
        for record in sorted((self.path / "steps").glob("*.json")):
            files.update(read_json(record, "files")["files"])
            files[str(record.relative_to(self.path))] = file_hash(record)
        if self.timings.is_file():
            files[self.timings.name] = file_hash(self.timings)
        content = {"format": FORMAT, "stage": self.stage, "task": self.task, "files": files, "follows": follows}
        write_json(self.manifest, content)

    def result(self) -> str:
        """Digest of a committed stage's result: its files but for records and timings, and what it was computed from.

        So a stage that is done again with the same result keeps the later ones.
        """
        manifest = read_json(self.manifest, "files", "follows")
        files = {
            name: digest
            for name, digest in manifest["files"].items()
            if name != self.timings.name and not name.startswith("steps/")
        }
        return hashlib.sha256(json.dumps([files, manifest["follows"]], sort_keys=True).encode()).hexdigest()

    @property
    def committed(self) -> bool:
        """Whether the stage is complete."""
        return self.manifest.is_file()

    def verify(self, follows: str) -> None:
        """Checks a committed stage.

        Raises:
            InputError: a file is missing or has changed, or the stage was computed from something else.
        """
        manifest = read_json(self.manifest, "files", "follows")
        self._verify_files(manifest["files"])
        if manifest["follows"] != follows:
            raise InputError(
                f"{self.path}: was computed after other earlier stages, or in another run, than those beside it. "
                f"Redo it and all later stages with --redo {self.stage}."
            )

    def clear_leftovers(self) -> None:
        """Removes what interrupted writes have left, and resume points of a training that is complete."""
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        if self._record("train").is_file():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _verify_files(self, hashes: Mapping[str, str]) -> None:
        advice = f". Restore it, or redo this stage and all later ones with --redo {self.stage}."
        verify_files(self.path, hashes, advice)


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path, tasks: Iterable[str]) -> None:
        self.path = path
        self._tasks = tuple(tasks)

    @property
    def manifest(self) -> Path:
        """`run.json`: resolved configuration, environment, fingerprints; see `record`."""
        return self.path / "run.json"

    def record(self, content: Mapping[str, Any]) -> None:
        """Writes `run.json`, with a hash of the rest of it under `sha256`."""
        text = json_text({**content, "sha256": ""})
        write_text(self.manifest, text.replace(_seal_line(""), _seal_line(_seal(text))))

    def recorded(self, *required: str) -> dict[str, Any]:
        """The content of `run.json`.

        Args:
            required: keys that it must have.

        Raises:
            InputError: missing, unreadable, without a required key, or changed since it was written.
        """
        text = read_text(self.manifest)  # once, as a command may write it anew meanwhile
        content = json_object(text, self.manifest)
        digest = content.pop("sha256", "")
        if _seal(text.replace(_seal_line(digest), _seal_line(""))) != digest:
            raise InputError(
                f"{self.manifest}: has changed since it was recorded, or is of another version of llava_cl. Restore "
                "it, or give another --output. To tell it of other paths, run with a configuration that has them."
            )
        missing = [f"{self.manifest}: field {key!r} is missing." for key in required if key not in content]
        if missing:
            raise InputError(*missing)
        return content

    @property
    def metrics(self) -> Path:
        """`metrics.json`: matrix, summary, and per stage seconds, memory and basis sizes."""
        return self.path / "metrics.json"

    @property
    def matrix(self) -> Path:
        """`accuracy_matrix.csv`."""
        return self.path / "accuracy_matrix.csv"

    def stage(self, number: int) -> StageDirectory:
        """Directory of a stage: 0 is the base model, 1..T the tasks."""
        task = "base" if number == 0 else self._tasks[number - 1]
        return StageDirectory(self.path / "stages" / f"{number:02d}-{task}", number, task)

    def before(self, stage: int) -> str:
        """Digest of what a stage is computed from: the stage before it, or for stage 0 the run's identity."""
        if stage:
            return self.stage(stage - 1).result()
        manifest = self.recorded("identity", "base", "data")
        facts = {key: manifest[key] for key in ("identity", "base", "data")}
        facts["base"] = facts["base"]["sha256"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def begun(self) -> bool:
        """Whether any step of any stage is recorded."""
        return next(self.path.glob("stages/*/steps/*.json"), None) is not None

    def trained_up_to(self) -> int:
        """The last stage whose model, with those of all stages before it, is complete."""
        last = 0
        while last < len(self._tasks) and self.stage(last + 1).trained:
            last += 1
        return last

    def stages(self) -> list[StageDirectory]:
        """All stages 1..T, committed or not."""
        return [self.stage(number) for number in range(1, len(self._tasks) + 1)]

    def set_aside(self, stage: int) -> list[Path]:
        """Moves a stage and all later ones into a new folder below `discarded/`; returns where they are now.

        Raises:
            InputError: there is none of them.
        """
        there = [self.stage(number).path for number in range(stage, len(self._tasks) + 1)]
        there = [path for path in there if path.exists()]
        if not there:
            raise InputError(f"--redo {stage}: {self.path} has no stage {stage} or later.")
        numbers = [int(path.name) for path in self.path.glob("discarded/*") if path.name.isdecimal()]
        folder = self.path / "discarded" / str(max(numbers, default=0) + 1)
        folder.mkdir(parents=True)
        # The last one first: what is left after a kill is then the beginning of a run.
        return [path.rename(folder / path.name) for path in reversed(there)]

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    def holder(self) -> str | None:
        """Which process, of any node that shares the file system's locks, works on the run directory.

        Returns:
            What tells it from every other one, "" if there is none, None if nothing can be known.
        """
        try:
            with self._lock.open() as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return stream.read()
        except OSError:
            return None
        return ""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run directory, so that no second process works on it.

        Raises:
            InputError: another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock.open("a")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); give another --output.") from error
        with lock as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{self.path}: another run is working on this directory; wait for it or give another --output."
                ) from error
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot be locked ({error.strerror}); give an --output on a file system with locks."
                ) from error
            stream.truncate(0)
            stream.write(secrets.token_hex(8))
            stream.flush()
            # Of writes that a kill has interrupted; those of a stage are the stage's own affair.
            for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):
                leftover.unlink()
            yield


def _seal(text: str) -> str:
    """The hash of a manifest's text in which that of the hash is empty."""
    return hashlib.sha256(text.encode()).hexdigest()


def _seal_line(digest: str) -> str:
    """The manifest's line of the hash; a nested one is indented further."""
    return f'\n "sha256": "{digest}"'
