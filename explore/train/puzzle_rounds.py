"""The iterative puzzle: each round goes part of the way to the budgets, distils briefly and rebuilds the library.

Source: the iterative Puzzle of Nemotron Puzzle 75B; it helps because replacements are measured one at a time, and their
divergences do not add up when many layers change at once.
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
    """Runs all rounds but the last; returns the distilled run from which the last begins, and what its library needs.

    With one round that is the parent. Sizes that no layer has after a round are not asked for in the next.

    Every round builds a new library from the distilled model of the round before, and goes an equal factor of the way
    to every budget. The teacher is always the first parent. The runs are written beside it; finished rounds survive a
    kill.

    Args:
        limits: budgets of the last round.
        rounds: number of rounds.
        tokens: training tokens of each distillation.
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
