"""DxMI: fine-tuning few-step diffusion samplers by maximum-entropy inverse RL (arXiv 2407.00626).

Plain PyTorch: nothing here imports Ray, Hydra or MLflow. The floors, lowest first:

    tensors, trajectory                      shapes and records
    schedules, networks, data, metrics       what a run is made of
    sampler, energy, value                   the policy and its critics
    losses, costs                            one equation a function
    algorithms                               one file an algorithm, update() from top to bottom
    evaluate, train, experiment              scores, the loop, and the config tree that builds both
"""

__version__ = "0.1.0"
