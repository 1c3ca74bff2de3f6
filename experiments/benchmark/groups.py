"""What there is to measure, cell by cell, and in what precision."""

import dataclasses
from typing import Any

import jax

from experiments import rnn_speed
from experiments.benchmark import matched, measure as ordinary
from experiments.benchmark.settings import Config, GroupName
from experiments.common.measurement import CellsConfig

_IN_DOUBLE = ("fits", "matched")


def cells_of(group: GroupName, config: Config) -> list[dict[str, Any]]:
    """All cells of a group, those that may be left out after those that show it."""
    if group == "gru":
        cells = rnn_speed.cells_of(_rnn_config(config))
        return [{"workload": "gru"} | cell for cell in cells]
    if group == "matched":
        chosen = matched.CHOSEN[:1] if config.smoke else matched.CHOSEN
        return [
            {"workload": "matched", "mode": "gradient", "problem": name}
            for name in chosen
        ]
    return [
        {"workload": sizes["workload"], "mode": mode} | sizes
        for sizes in _sizes(group, config)
        for mode in config.modes
    ]


def _sizes(group: GroupName, config: Config) -> list[dict[str, Any]]:
    if group == "mlp":
        return [
            {
                "workload": "mlp",
                "dim": dim,
                "width": width,
                "batch_size": batch_size,
                "num_steps": num_steps,
            }
            for num_steps in sorted(config.steps)
            for dim, width in config.sizes
            for batch_size in sorted(config.batch_sizes)
        ]
    if group == "fits":
        names = ("fitzhugh_nagumo", "lotka_volterra")
        return [
            {"workload": name, "dim": 2, "batch_size": 1, "num_steps": num_steps}
            for num_steps in sorted(config.fit_steps)
            for name in (names[:1] if config.smoke else names)
        ]
    if group == "hnn":
        small = {"width": 8, "depth": 1, "batch_size": 2, "num_steps": 8}
        large = {"width": 64, "depth": 6, "batch_size": 8, "num_steps": 128}
        sizes = small if config.smoke else large
        return [{"workload": "two_body_hnn", "dim": 8} | sizes]
    small = {"width": 8, "batch_size": 2, "num_steps": 2}
    large = {"width": 64, "batch_size": 64, "num_steps": 16}
    sizes = small if config.smoke else large
    return [{"workload": "cnf", "dim": 2} | sizes]


def _rnn_config(config: Config) -> rnn_speed.Config:
    names = [field.name for field in dataclasses.fields(CellsConfig)]
    settings = rnn_speed.Config(**{name: getattr(config, name) for name in names})
    return settings.reduced() if config.smoke else settings


def measure_cell(
    group: GroupName,
    cell: dict[str, Any],
    cells: list[dict[str, Any]],
    config: Config,
) -> dict[str, Any]:
    """Measures one cell of a group; `cells` are those measured before."""
    # Float32 means float32, and not what a GPU makes of it for speed.
    with (
        jax.enable_x64(group in _IN_DOUBLE),
        jax.default_matmul_precision("highest"),
    ):
        if group == "gru":
            return rnn_speed.measure(cell, cells, _rnn_config(config))
        if group == "matched":
            return matched.measure(cell, config)
        return ordinary.measure(cell, cells, config)
