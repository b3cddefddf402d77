"""HTML pages of results: a suite, the leaderboard, the claims."""
