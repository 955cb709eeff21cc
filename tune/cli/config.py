"""`dxmi config`: print the resolved configuration of an experiment."""

import argparse

import yaml

from dxmi.training.schema import config_tree
from tune.cli.exit_codes import OK
from tune.config.compose import compose_experiment


def config(args: argparse.Namespace) -> int:
    """Print every setting of an experiment with its value, as YAML."""
    composed = compose_experiment(args.overrides)
    print(f"# signature {composed.experiment.signature}")
    print(yaml.safe_dump(config_tree(composed.experiment), sort_keys=False), end="")
    return OK
