"""MicroDiT in JAX: text-to-image diffusion transformers on a micro-budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro_dit.api import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports `load` on first use, so that importing a submodule does not import the whole package."""
    if name == "load":
        from micro_dit.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
