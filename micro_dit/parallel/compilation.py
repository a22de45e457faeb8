"""What XLA is told when a training step is compiled."""

import jax


def compiler_options() -> dict[str, str]:
    """XLA's options for the backend in use.

    On a CPU, XLA drops all optimization barriers before it merges equal expressions and fuses. That undoes
    rematerialization (what was to be computed again is kept), and sums along the residual stream are then computed
    anew for every reader, which costs time with the square of the depth. So there the barriers stay.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}
