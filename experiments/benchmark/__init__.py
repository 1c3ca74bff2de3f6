"""One harness for every claim about speed: `python -m experiments.benchmark`."""
