"""What the files of a run directory hold, as far as the report reads them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt

Row = list[FiniteFloat | None]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseModelInfo(_Schema):
    """The pretrained model that the run started from."""

    path: str
    sha256: str


class CodeChange(_Schema):
    """Source files of llava_cl that had changed when a run was continued."""

    time: str
    files: list[str]


class RunInfo(_Schema):
    """run.json: what was asked for, on what."""

    format: Literal[1, 2]
    name: str
    started: datetime
    config: dict[str, Any]
    environment: dict[str, Any]
    base: BaseModelInfo
    benchmark: str
    method: str
    tasks: list[str] = Field(min_length=1)
    probes: list[str] = []
    seed: int
    ranks: PositiveInt
    code_changes: list[CodeChange] = []


class Probes(_Schema):
    """Accuracy (percent) on the base model's own questions, one row for each of stages 0..t (1..t without a base)."""

    names: list[str] = []
    rows: list[Row] = []


class LayerBasis(_Schema):
    """One layer's basis after a stage: it spans `columns` of the `of` input dimensions; `added` columns are new.

    `energy` is the share of the weight's squared Frobenius norm in its span, 0 to 1. Runs of earlier versions have in
    `columns` how many there are, which need not be independent.
    """

    columns: NonNegativeInt
    added: NonNegativeInt
    of: PositiveInt
    energy: FiniteFloat | None = None

    @property
    def fill(self) -> float:
        """Share of the input space that the basis takes, 0 to 1."""
        return min(self.columns / self.of, 1.0)


class StageCost(_Schema):
    """What one stage took: seconds and peak memory in bytes of each step and in all, samples and tokens a second of
    training, and the bases it left.
    """

    stage: NonNegativeInt
    task: str
    seconds: dict[str, FiniteFloat] = {}
    step_memory_bytes: dict[str, NonNegativeInt] = {}
    peak_memory_bytes: NonNegativeInt | None = None
    training: dict[str, FiniteFloat] = {}
    basis: dict[str, LayerBasis] = {}


class Metrics(_Schema):
    """metrics.json: accuracies in percent, `matrix[stage][task]`, rows for the stages done so far."""

    format: Literal[1]
    tasks: list[str] = Field(min_length=1)
    matrix: list[Row] = []
    base_row: Row | None = None
    strict_matrix: list[Row] | None = None
    probes: Probes = Probes()
    summary: dict[str, FiniteFloat | None] | None = None
    majority: dict[str, FiniteFloat | None] = {}
    stages: list[StageCost] = []

    @property
    def rows(self) -> list[Row]:
        """The rows of accuracies that there are, the base's first if it was evaluated."""
        return [*([] if self.base_row is None else [self.base_row]), *self.matrix]

    @property
    def first_stage(self) -> int:
        """The stage of the first row: 0 where the base was evaluated, else 1."""
        return int(self.base_row is None)

    def shape_problems(self) -> list[str]:
        """Every row whose length does not match its header, and every table with too many rows."""
        width = len(self.tasks)
        problems = []
        tables = {"matrix": self.matrix, "strict_matrix": self.strict_matrix or []}
        for name, rows in tables.items():
            if len(rows) > width:
                problems.append(f"field {name}: {len(rows)} rows for {width} tasks")
            problems += _ragged(name, rows, width)
        if self.base_row is not None:
            problems += _ragged("base_row", [self.base_row], width)
        if self.probes.rows and len(self.probes.rows) - len(self.matrix) not in (0, 1):
            problems.append(f"field probes.rows: {len(self.probes.rows)} rows for {len(self.matrix)} stages")
        return problems + _ragged("probes.rows", self.probes.rows, len(self.probes.names))


def first_probed(metrics: Metrics) -> int:
    """The stage of the first row of probes: 0 where the base was evaluated, else 1."""
    return len(metrics.matrix) + 1 - len(metrics.probes.rows)


class TaskScore(_Schema):
    """The scores of one task after one stage, in percent."""

    scorer: str
    score: FiniteFloat | None
    strict_score: FiniteFloat | None = None
    items: NonNegativeInt
    metrics: dict[str, FiniteFloat | None] = {}
    credits: dict[str, FiniteFloat] = {}
    """Points of each question by its id."""


class StageScores(_Schema):
    """scores.json of one stage."""

    scores: dict[str, TaskScore]


class LogLine(_Schema):
    """One optimizer step of a training."""

    step: NonNegativeInt
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None


def _ragged(name: str, rows: list[Row], width: int) -> list[str]:
    return [
        f"field {name}.{index}: {len(row)} values for {width} columns"
        for index, row in enumerate(rows)
        if len(row) != width
    ]
