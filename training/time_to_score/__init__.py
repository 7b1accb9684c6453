"""How long a run takes to a named score, and the leaderboard of such runs."""
