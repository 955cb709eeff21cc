"""DxMI: fine-tuning few-step diffusion samplers by maximum-entropy inverse RL (arXiv 2407.00626).

Plain PyTorch: nothing here imports Ray, Hydra or MLflow. The settings modules (`config` and `configs` in each package)
do not import PyTorch either. The packages, from the lowest layer up:

    persistence               files, checkpoints, the run directory
    data, networks, metrics   data sets, denoisers and critics, scores of samples
    optim, diffusion          optimizers; schedules, the policy and its trajectories
    critics, rewards          energy and value; rewards of samples
    algorithms                one file per algorithm, whose update() is one iteration
    evaluation                sampling, scoring, and the samplers that a policy is compared with
    visualization             figures
    training                  the training loop, and the config from which a run is built
"""

__version__ = "0.2.0"
