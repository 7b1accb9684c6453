"""What a run is to reach, as `microvlm-train` was asked: a score, a leaderboard, a price. Imports no torch at first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from microvlm.bench.training.leaderboard_records import Entry
from microvlm.console import note
from microvlm.errors import UserError
from microvlm.training.time_to_score.leaderboard import add_to_leaderboard, check_leaderboard
from microvlm.training.time_to_score.score_target import ScoreTarget, parse_target


@dataclass(frozen=True)
class Goal:
    """The score of --until, and what is done at the end of the run."""

    target: ScoreTarget
    leaderboard: Path | None
    price_per_hour: float | None

    def finish(self, run: Path) -> Entry:
        """Read the time to the score from the finished run, and add the run to the leaderboard. Raises UserError."""
        from microvlm.training.time_to_score.run_outcome import run_outcome

        entry = run_outcome(run, self.target, self.price_per_hour)
        if self.leaderboard is None:
            return entry
        if not entry.score.reached:
            note(f"{self.leaderboard} is as it was: the run did not reach its score")
        elif add_to_leaderboard(self.leaderboard, entry):
            note(f"added to {self.leaderboard}")
        else:
            note(f"{self.leaderboard} has this run already")
        return entry

    def lines(self, entry: Entry) -> list[str]:
        from microvlm.training.time_to_score.run_outcome import outcome_lines

        return outcome_lines(entry, self.target)


def parse_goal(until: str | None, leaderboard: Path | None, price_per_hour: float | None) -> Goal | None:
    """The goal of the flags; None without one. Raises UserError, also for a leaderboard that cannot be added to."""
    if until is None:
        for flag, value in (("--leaderboard", leaderboard), ("--price-per-hour", price_per_hour)):
            if value is not None:
                raise UserError(f"{flag} goes with --until NAME=VALUE, the score that the run is to reach.")
        return None
    target = parse_target(until)
    if leaderboard is not None:
        check_leaderboard(leaderboard)
    return Goal(target, leaderboard, price_per_hour)
