"""Everything between a config and a finished run: building, pretraining, fine-tuning, summary, loading and export."""
