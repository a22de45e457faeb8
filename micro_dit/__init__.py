"""MicroDiT in JAX: text-to-image diffusion transformers on a micro-budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro_dit.api import load

    __version__: str

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Resolves `load` and `__version__` on first use, so that importing a submodule loads nothing else."""
    if name == "load":
        from micro_dit.api import load

        return load
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Returns the version of the installed package, or of the checkout that the package is imported from."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:
        project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(project)["project"]["version"]
