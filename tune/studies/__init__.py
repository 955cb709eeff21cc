"""What a study has done: its folder, its records, the leaderboard, and the results of its arms."""
