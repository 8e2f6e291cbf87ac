"""labkit: a laboratory for training neural networks on uneven clusters, driven from notebooks.

Every public name stands in `__init__.pyi`, where editors and type checkers find it, and is looked up on first use, so that
`import labkit` loads neither torch nor bokeh.
"""

import lazy_loader

_public, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("labkit")
    if name not in _names:
        from labkit.names import unknown_attribute

        raise AttributeError(unknown_attribute("module 'labkit'", name, _names), name=name)
    return _public(name)


def __dir__() -> list[str]:
    return sorted(__all__)
