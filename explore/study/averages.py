"""Merging in a sweep: runs without a learning-rate decay keep checkpoints, and averages of the last ones are scored."""

from __future__ import annotations

from dataclasses import dataclass

from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.train import decay_weights, score_merge, stable_steps
from explore.train.merging import Shape


@dataclass(frozen=True)
class Merging:
    """Averages checkpoints of every run without a learning-rate decay, in place of the decay.

    Averages are made as in `explore merge` when a run or a pilot has finished. The learning rate of a run without a
    decay is tuned for its average of the first shape.

    Attributes:
        share: fraction of the steps, at the end of a run, that the averaged checkpoints cover.
        last: number of checkpoints in an average.
        shapes: decay shapes that the averages imitate.
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
        """Steps between the checkpoints that a run keeps; None for a run with a decay."""
        return None if experiment.train.decay else max(1, round(self.share * experiment.n_steps / self.last))

    def score(self, experiment: Experiment) -> str:
        """Column of the table of runs by which an experiment's learning rate is tuned."""
        return "val_bpb" if experiment.train.decay else f"val_bpb_{self.shapes[0]}"

    def merge(self, folder: RunFolder) -> None:
        """Scores the averages of a finished run, except averages of the same checkpoints that are already scored.

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
