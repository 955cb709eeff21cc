"""Reading and writing public checkpoints: their files, their layouts, and folders of diffusers."""
