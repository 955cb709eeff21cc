"""From a config to a finished run: building, pretraining, fine-tuning, summary, loading and export."""
