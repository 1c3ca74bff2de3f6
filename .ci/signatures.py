"""Signatures of classes whose `__init__` Equinox makes at run time, for the site."""

from collections.abc import Iterator
from typing import Any

import griffe

# Annotations of what belongs to the class, or to those that inherit from it.
_NO_FIELDS = ("typing.ClassVar", "equinox.AbstractVar", "equinox.AbstractClassVar")


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    """All that is defined in a package, and not just imported."""
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield member
            yield from _objects(member)


def _default(value: Any, package: griffe.Module) -> Any:
    """What stands for the default: within `eqx.field`, and a number for its name."""
    if isinstance(value, griffe.ExprCall) and value.canonical_path == "equinox.field":
        named = (x for x in value.arguments if isinstance(x, griffe.ExprKeyword))
        value = next((x.value for x in named if x.name == "default"), None)
    if isinstance(value, griffe.ExprName):
        folder, _, name = value.canonical_path.rpartition(".")
        if folder == f"{package.path}._defaults":
            return package["_defaults"][name].value
    return value


class Signatures(griffe.Extension):
    """Tells griffe that an `eqx.Module` is a data class, which it can read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Comes before griffe's own extension for data classes."""
        dataclass = griffe.ExprName("dataclass", parent="dataclasses")
        for x in list(_objects(pkg)):
            if isinstance(x, griffe.Class):
                x.decorators.append(
                    griffe.Decorator(dataclass, lineno=None, endlineno=None)
                )
            elif isinstance(x, griffe.Attribute) and x.annotation is not None:
                x.value = _default(x.value, pkg)
                if getattr(x.annotation, "canonical_path", "") in _NO_FIELDS:
                    x.labels.discard("instance-attribute")
                    x.labels.add("class-attribute")
