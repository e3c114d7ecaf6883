"""Merging in a sweep: runs without a decay keep checkpoints, and averages of the last of them are scored."""

from __future__ import annotations

from dataclasses import dataclass

from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.train import decay_weights, score_merge, stable_steps
from explore.train.merging import Shape


@dataclass(frozen=True)
class Merging:
    """Averages of checkpoints, in place of a decay of the learning rate, of every run of a sweep that has no decay.

    They are made as `explore merge` makes them, once a run has finished, pilots too: the learning rate of a run without
    a decay is searched for its average of the first shape.

    Attributes:
        share: of the steps, at the end of a run, from which the checkpoints are.
        last: checkpoints in an average.
        shapes: decays that the averages imitate.
    """

    share: float = 0.2
    last: int = 8
    shapes: tuple[Shape, ...] = ("minus_sqrt", "flat")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"merging.share must be above 0 and at most 1, got {self.share}")
        if not self.shapes:
            raise ValueError("merging.shapes must name at least one shape, got ()")
        for shape in self.shapes:
            decay_weights(self.last, shape)

    def keep_every(self, experiment: Experiment) -> int | None:
        """Steps between the checkpoints that a run keeps; None of one that decays."""
        return None if experiment.train.decay else max(1, round(self.share * experiment.n_steps / self.last))

    def score(self, experiment: Experiment) -> str:
        """Column of the table of runs for which the learning rate of an experiment is searched."""
        return "val_bpb" if experiment.train.decay else f"val_bpb_{self.shapes[0]}"

    def merge(self, folder: RunFolder) -> None:
        """Scores the averages of a run, if it has finished, but those of the same checkpoints that are told already.

        Raises:
            ValueError: the run did not keep enough checkpoints.
        """
        if folder.status != "finished":
            return
        steps = self._steps(folder.load_experiment())
        for shape in self.shapes:
            if folder.merged.get(shape, {}).get("steps") != steps:
                score_merge(folder, self.last, shape)

    def _steps(self, experiment: Experiment) -> list[int]:
        """Steps of the checkpoints in an average."""
        every, stable = self.keep_every(experiment) or 1, stable_steps(experiment.n_steps, experiment.train)
        return [step for step in range(every, experiment.n_steps + 1, every) if step in stable][-self.last :]
