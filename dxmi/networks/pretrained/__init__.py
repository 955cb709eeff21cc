"""Public checkpoints: their files, their layouts, and folders of diffusers."""
