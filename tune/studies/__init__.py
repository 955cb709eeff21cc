"""State and results of a study: its folder, trial records, leaderboard, and the results of its arms."""
