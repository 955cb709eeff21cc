"""What a study is to do: the plan of a sweep, the arms of an ablation, and the settings that have no effect."""
