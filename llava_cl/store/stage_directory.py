"""One stage of a run: its files, and the manifests that say what of it is complete and what it was computed from.

A step is complete when its record `steps/<step>.json` exists and the files it names still have the recorded hashes;
the stage is committed when `stage.json` exists. Both are written last, and both name what the stage follows: the run
and the stages before it. So neither a step nor a stage of another run, or of another place in this one, is taken over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llava_cl.errors import InputError
from llava_cl.store.files import file_hash, read_record, verify_files, write_json

FORMAT = 2
"""Of a run's directory. In format 1 the records of steps did not say what they follow."""

LIVE_LOG = "log.jsonl"
"""Rows of the training under way, in the Trainer's scratch folder; after a resume some steps are there twice."""


class Origin(NamedTuple):
    """What a stage is computed from.

    Attributes:
        digest: of the result of the stage before it, or for stage 0 of the run's identity, base model and data.
        told: whether the records of its steps tell it; those of format 1 do not.
    """

    digest: str
    told: bool


class StageDirectory:
    """One stage's files below `stages/`. Stage 0 is the untouched base model.

    Args:
        path: the stage's folder.
        stage: its number.
        task: what it learns.
        origin: what it is computed from, see `RunDirectory.before`; asked for where something is recorded or verified.

    Attributes:
        adapter: folder of the stage's adapter in PEFT's layout.
        moments: running second moments of the layers' inputs, where the method uses them.
        initial_factors: LoRA factors before training.
        subspace: the columns that this stage added to the basis of each layer, `[in, j]` fp32.
        predictions: folder of the raw predictions, one JSON Lines file a task.
        scores: of all tasks evaluated at this stage.
        train_log: loss and learning rate of every optimizer step.
        timings: seconds and peak memory of every step, and samples and tokens a second of training.
        checkpoints: scratch folder of the Trainer's resume points, removed when training is complete.
        live_log: what `train_log` will hold, while the stage is being trained.
        manifest: `stage.json`, whose existence means that the stage is committed.
    """

    def __init__(self, path: Path, stage: int, task: str, origin: Callable[[], Origin]) -> None:
        self.path = path
        self.stage = stage
        self.task = task
        self.origin = origin
        self.adapter = path / "adapter"
        self.moments = path / "moments.safetensors"
        self.initial_factors = path / "initial_factors.safetensors"
        self.subspace = path / "subspace.safetensors"
        self.predictions = path / "predictions"
        self.scores = path / "scores.json"
        self.train_log = path / "train_log.jsonl"
        self.timings = path / "timings.json"
        self.checkpoints = path / "checkpoints"
        self.live_log = self.checkpoints / LIVE_LOG
        self.manifest = path / "stage.json"

    def _record(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def step_done(self, step: str) -> bool:
        """Whether a step is complete, its files are as recorded, and it was computed from the stages before this one.

        Raises:
            InputError: the step was recorded but a file is missing or has changed since, or it follows something else.
        """
        record = self._record(step)
        if not record.is_file():
            return False
        content = read_record(record)
        self._verify(content["files"], content.get("follows"))
        return True

    def record_step(self, step: str, files: Iterable[Path], **facts: Any) -> None:
        """Declares a step complete; call it after its files are written."""
        hashes = {str(file.relative_to(self.path)): file_hash(file) for file in sorted(files)}
        known = {"format": FORMAT, "step": step, "files": hashes, "follows": self.origin().digest}
        write_json(self._record(step), {**known, **facts})

    @property
    def trained(self) -> bool:
        """Whether the model after this stage can be put together: its training is recorded, or it needs none."""
        return self.stage == 0 or self._record("train").is_file()

    def facts(self, step: str) -> dict[str, Any] | None:
        """What was recorded with a step, None if it is not complete."""
        record = self._record(step)
        return dict(read_record(record)) if record.is_file() else None

    def _records(self) -> list[Path]:
        return sorted((self.path / "steps").glob("*.json"))

    def step_facts(self) -> list[dict[str, Any]]:
        """What was recorded with every complete step."""
        return [dict(read_record(record)) for record in self._records()]

    def commit(self) -> None:
        """Writes `stage.json` with the hashes of all recorded files and of the records themselves."""
        files: dict[str, str] = {}
        for record in self._records():
            files.update(read_record(record)["files"])
            files[str(record.relative_to(self.path))] = file_hash(record)
        if self.timings.is_file():
            files[self.timings.name] = file_hash(self.timings)
        known = {"format": FORMAT, "stage": self.stage, "task": self.task}
        write_json(self.manifest, {**known, "files": files, "follows": self.origin().digest})

    def result(self) -> str:
        """Digest of a committed stage's result: its files but for records and timings, and what it was computed from.

        So a stage that is done again with the same result keeps the later ones.
        """
        manifest = read_record(self.manifest, "follows")
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

    def verify(self) -> None:
        """Checks what is recorded of the stage, committed or under way.

        Raises:
            InputError: a file is missing or has changed, or the stage was computed from something else.
        """
        if self.committed:
            manifest = read_record(self.manifest, "follows")
            self._verify(manifest["files"], manifest["follows"])
        else:
            for record in self._records():
                self.step_done(record.stem)

    def clear_leftovers(self) -> None:
        """Removes what interrupted writes have left, and resume points of a training that is complete."""
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        if self._record("train").is_file():
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _verify(self, files: dict[str, str], follows: str | None) -> None:
        again = f"edo this stage and all later ones with --redo {self.stage}."
        verify_files(self.path, files, f". Restore it, or r{again}")
        origin = self.origin()
        if follows != origin.digest and (origin.told or follows is not None):
            raise InputError(
                f"{self.path}: was computed after other earlier stages, or in another run, than those beside it. "
                f"R{again}"
            )
