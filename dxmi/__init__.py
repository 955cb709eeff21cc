"""DxMI: fine-tuning few-step diffusion samplers by maximum-entropy inverse RL (arXiv 2407.00626).

Plain PyTorch: nothing here imports Ray, Hydra or MLflow. The modules of settings, `config` and `configs` in each
package, do not import PyTorch either. The packages, lowest first:

    persistence               files, checkpoints, the folder of a run
    data, networks, metrics   what a run is made of
    optim, diffusion          optimizers; schedules, the policy and its trajectories
    critics, algorithms       energy and value; one file an algorithm, update() from top to bottom
    evaluation                scores
    training                  the loop, and the config from which all of this is built
"""

__version__ = "0.2.0"
