"""The iterative puzzle: a part of the way to the budgets, a short distillation, and the library again.

Source: the iterative Puzzle of Nemotron Puzzle 75B; why it helps is that replacements are measured one at a time, and
their divergences do not add up where many layers change at once.
"""

from __future__ import annotations

from explore.compress.library import LibraryRequest
from explore.compress.measures import Setting
from explore.compress.puzzle import Limits, Puzzle
from explore.runs import RunFolder
from explore.train.blockwise import block_library
from explore.train.child import child_experiment
from explore.train.fitting import fit


def puzzle_rounds(
    run: RunFolder, limits: Limits, request: LibraryRequest, setting: Setting, rounds: int, tokens: int
) -> tuple[RunFolder, LibraryRequest]:
    """The run from which the last round begins, and what its library is made of.

    That is the run of the round before, distilled, or the parent where there is none; sizes that a round has left no
    layer with are no longer asked for.

    Every round makes its library anew, from what the one before distilled, and goes an equal factor of the way to every
    budget. The teacher is always the first parent. The runs lie beside it, and a kill costs no round that was finished.

    Args:
        limits: of the last round.
        rounds: steps on the way to the budgets.
        tokens: of each distillation.
    """
    first = run
    whole: dict[str, float] = {}
    for i in range(1, rounds):
        library = block_library(run, request)
        puzzle = Puzzle(library, setting)
        whole = whole or {name: puzzle.parent_cost(name) for name in limits.most}
        most = {name: whole[name] * (limits.most[name] / whole[name]) ** (i / rounds) for name in whole}
        drop = None if limits.drop is None else round(limits.drop * i / rounds)
        (choice,) = puzzle.solve(part := Limits(most, limits.same, drop))
        plan = puzzle.plan(choice, part)
        path = run.path / "plans" / f"{plan.key()[:8]}.json"
        plan.save(path)
        name = f"name={first.load_experiment().name}-round-{i}"
        experiment = child_experiment(path, tokens, parent=run.path, teacher=first.path, overrides=[name])
        run = fit(experiment, first.path.parent)
        request = request.model_copy(update={"offer": request.offer.within(experiment.model)})
    return run, request
