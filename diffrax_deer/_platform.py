"""What depends on the platform that a program runs on."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def by_platform(on_cpu: Callable[[], Any], elsewhere: Callable[[], Any]) -> Any:
    """Either result; the choice is made when the program is compiled."""
    if jax.default_backend() == "cpu":
        # There is nothing else; it would cost the time to trace it.
        return on_cpu()
    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)
