"""Pages of results: suites, the leaderboard, and claims of papers."""
