"""The run directory: its layout, its manifest `run.json`, and the chain of its stages."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cl.errors import InputError
from llava_cl.parsing import read_text
from llava_cl.store.files import json_object, json_text, read_json, write_json, write_text, writing
from llava_cl.store.stage_directory import FORMAT, Origin, StageDirectory


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
        if content.get("format", FORMAT) not in range(1, FORMAT + 1):
            raise InputError(f"{self.manifest}: is of a newer version of llava_cl; use that one.")
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
        path = self.path / "stages" / f"{number:02d}-{task}"
        return StageDirectory(path, number, task, functools.partial(self.before, number))

    def before(self, stage: int) -> Origin:
        """What a stage is computed from: the stage before it, or for stage 0 the run's identity."""
        manifest = self.recorded("identity", "base", "data")
        told = manifest.get("format", FORMAT) > 1
        if stage:
            return Origin(self.stage(stage - 1).result(), told)
        facts = {key: manifest[key] for key in ("identity", "base", "data")}
        facts["base"] = facts["base"]["sha256"]
        return Origin(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), told)

    @property
    def begun(self) -> bool:
        """Whether any step of any stage is recorded."""
        return next(self.path.glob("stages/*/steps/*.json"), None) is not None

    def verified(self, last: int | None = None) -> list[StageDirectory]:
        """The stages 0, 1, ... up to `last` whose models are complete, with all that is recorded of them verified.

        Every command that reads a run asks here, so that none takes a stage that was changed, moved or brought from
        another run for one of this run.

        Args:
            last: the last stage to look at; default the last of the stream.

        Raises:
            InputError: a file is missing or has changed, or a stage was computed from something else.
        """
        found: list[StageDirectory] = []
        for number in range(len(self._tasks) + 1 if last is None else min(last, len(self._tasks)) + 1):
            stage = self.stage(number)
            stage.verify()
            if stage.trained:
                found.append(stage)
            if not stage.committed:
                break
        return found

    def stages(self) -> list[StageDirectory]:
        """All stages 1..T, committed or not."""
        return [self.stage(number) for number in range(1, len(self._tasks) + 1)]

    @property
    def redo(self) -> Path:
        """Which stages are being done again, and what of the old ones is still to be moved."""
        return self.path / "redo.json"

    def set_aside(self, stage: int | None) -> list[Path]:
        """Moves a stage and all later ones into a new folder below `discarded/`; returns where they are now.

        Once: until `redone` is called, nothing is moved again for the same stage. What was interrupted before is
        moved to its end first, for which alone None is given.

        Raises:
            InputError: there is none of them.
        """
        begun = read_json(self.redo, "stage", "folder", "left") if self.redo.is_file() else None
        moved = self._move(begun) if begun else []
        if stage is None or (begun and begun["stage"] == stage):
            return moved
        there = [self.stage(number).path for number in range(stage, len(self._tasks) + 1)]
        left = [path.name for path in there if path.exists()]
        if not left:
            raise InputError(f"--redo {stage}: {self.path} has no stage {stage} or later.")
        numbers = [int(path.name) for path in self.path.glob("discarded/*") if path.name.isdecimal()]
        return self._move({"stage": stage, "folder": str(max(numbers, default=0) + 1), "left": left})

    def _move(self, redo: dict[str, Any]) -> list[Path]:
        """Does what is left of a move; what is written down before it and after it lets another process go on."""
        if not redo["left"]:
            return []
        write_json(self.redo, redo)
        folder = self.path / "discarded" / redo["folder"]
        with writing(folder, clean_up=lambda: None):
            folder.mkdir(parents=True, exist_ok=True)
            # The last one first: what is left after a kill is then the beginning of a run.
            for name in reversed(redo["left"]):
                if (self.path / "stages" / name).exists():
                    (self.path / "stages" / name).rename(folder / name)
        write_json(self.redo, {**redo, "left": []})
        return [folder / name for name in reversed(redo["left"])]

    def redone(self) -> None:
        """A run has come to its end: if the stage that was set aside is done again, it may be set aside anew."""
        if self.redo.is_file() and self.stage(read_json(self.redo, "stage")["stage"]).committed:
            self.redo.unlink()

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
