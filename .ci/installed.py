"""Solves something with what is installed, and says which versions that is."""

import importlib.metadata

import diffrax
import jax
import jax.numpy as jnp

import diffrax_deer

jax.config.update("jax_enable_x64", True)

names = ["jax", "jaxlib", "diffrax", "equinox", "lineax", "optimistix", "jaxtyping"]
print(diffrax_deer.__file__, *[f"{n} {importlib.metadata.version(n)}" for n in names])


def loss(rate, solver, controller):
    """The final state of an oscillator, squared."""
    field = lambda t, y, args: jnp.stack([y[1], -args * y[0]])
    y0 = jnp.array([1.0, 0.0])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        1.0,
        None,
        y0,
        rate,
        stepsize_controller=controller,
    )
    return jnp.sum(solution.ys[-1] ** 2)


steps = diffrax.StepTo(jnp.linspace(0.0, 1.0, 65))
newton = diffrax_deer.DEERSolver(num_steps=64, method=diffrax_deer.Newton())
results = [
    jax.value_and_grad(loss)(2.0, *each)
    for each in [
        (diffrax.Dopri5(), steps),
        (newton, diffrax_deer.WholeInterval()),
        (diffrax_deer.DEERSolver(), steps),
        (diffrax_deer.DEERSolver(num_steps=64), diffrax_deer.WholeInterval()),
    ]
]
for result in results[1:]:
    assert jnp.allclose(jnp.stack(result), jnp.stack(results[0]), rtol=1e-10), results
