"""The messages between a training process and its worker, as lines of JSON: a job, and the answer to it.

Imports the standard library and of hub_tools `errors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ... import errors
from ...errors import CheckpointPushError, GPT2ValueHubError, OptionsError

NOTE = "gpt2-value-checkpoint: "  # a line in a commit's description: the step and its metrics, as JSON


@dataclass(frozen=True)
class Destination:
    """Where checkpoints are pushed, and with which token."""

    repo_id: str
    branch: str
    private: bool | None
    token: str | None = field(repr=False)
    patience: float  # seconds


@dataclass(frozen=True)
class PackageOptions:
    """How checkpoints are saved; see `save_package`."""

    base_model: str | None
    license: str | None
    tags: tuple[str, ...]
    max_shard_size: int | str


@dataclass(frozen=True)
class BestRule:
    """Which checkpoint is the best, and the tag that it gets."""

    metric: str
    greater_is_better: bool
    tag: str

    def score(self, metrics: Mapping[str, float]) -> float:
        """The score of a checkpoint: higher is better, and -inf if the metric is missing or not finite."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.greater_is_better else -value


@dataclass(frozen=True)
class Job:
    """One checkpoint to push. The model itself lies in the worker's folder (see `snapshot`)."""

    step: int
    metrics: dict[str, float]
    dataset: str
    destination: Destination
    package: PackageOptions
    rule: BestRule | None
    verified: str | None = None  # fingerprint of the last package that was verified; see `worker`

    @property
    def title(self) -> str:
        """The commit's title: the step and the metrics."""
        metrics = ", ".join(f"{name}={value:.6g}" for name, value in self.metrics.items())
        return f"Step {self.step}: {metrics}" if metrics else f"Step {self.step}"

    @property
    def note(self) -> str:
        """A line for the commit's description, from which later jobs read the metrics of this checkpoint."""
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return NOTE + json.dumps({"step": self.step, "metrics": finite})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        found = json.loads(text)
        found["destination"] = Destination(**found["destination"])
        found["package"] = PackageOptions(**found["package"])
        found["rule"] = found["rule"] and BestRule(**found["rule"])
        return cls(**found)


@dataclass(frozen=True)
class PushedCheckpoint:
    """A checkpoint that is on the Hub."""

    step: int
    metrics: dict[str, float]
    commit: str
    url: str
    committed: bool  # False if the branch held exactly this already
    best: bool  # whether it is the best so far, and carries the tag


@dataclass(frozen=True)
class Success:
    """The answer to a job that succeeded."""

    pushed: PushedCheckpoint
    verified: str  # fingerprint, for the next job
    processor_seconds: float  # used so far by the worker and by the interpreter in which it verified

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def failure_to_json(error: GPT2ValueHubError) -> str:
    """The answer to a job that failed with an error that a user can fix."""
    return json.dumps({"error": type(error).__name__, **vars(error)})


def read_answer(text: str) -> Success:
    """Parse an answer.

    Raises:
        The error that the job failed with, of the same type.
    """
    found = json.loads(text)
    if "error" in found:
        kind: type[GPT2ValueHubError] = getattr(errors, found.pop("error"))
        raise kind(**found)
    return Success(**{**found, "pushed": PushedCheckpoint(**found["pushed"])})


def push_error(step: int, repo_id: str, cause: BaseException) -> CheckpointPushError:
    """The error that says why a checkpoint is not on the Hub. `cause` becomes its `__cause__`."""
    known = cause
    if not isinstance(known, GPT2ValueHubError):
        advice = "correct what this error names; the next checkpoint is tried all the same"
        known = GPT2ValueHubError(f"{type(cause).__name__}: {cause}", next_step=advice)
    error = CheckpointPushError(
        f"the checkpoint of step {step} is not on {repo_id}: {known.found}",
        expected=known.expected,
        next_step=known.next_step,
        step=step,
    )
    error.__cause__ = cause
    return error


def metrics_in(description: str) -> dict[str, float]:
    """The metrics in a commit's description; empty if the commit is not a checkpoint."""
    for line in description.splitlines():
        if line.startswith(NOTE):
            try:
                metrics = json.loads(line.removeprefix(NOTE))["metrics"]
                return {name: float(value) for name, value in metrics.items()}
            except (ValueError, TypeError, LookupError, AttributeError):  # somebody edited it
                return {}
    return {}


def as_numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert the metrics to floats.

    Raises:
        OptionsError: one of them is no number.
    """
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise OptionsError(
                f"the metric {name!r} is {value!r}", expected="a number", next_step="pass float(...) or leave it out"
            ) from error
    return numbers
