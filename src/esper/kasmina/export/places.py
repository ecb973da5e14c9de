"""How a place in a tree of modules is written in Python."""

from torch import nn

from esper.kasmina.export.layout import Group, Text, literal, prefixed


def access(module: nn.Module, path: str) -> str:
    """Return the expression for what is at a place in a module, which is ``self``."""
    text, current = "self", module
    for key in path.split(".") if path else []:
        text = _step(text, current, key)
        found = getattr(current, key)
        current = found if isinstance(found, nn.Module) else current
    return text


def assignment(module: nn.Module, path: str, value: str) -> str:
    """Return the statement that puts something at a place in a module, which is ``self``."""
    owner, _, key = path.rpartition(".")
    at = access(module, owner)
    if key.isidentifier():
        return f"{at}.{key} = {value}"
    return f"setattr({at}, {literal(key)}, {value})"


def registration(name: str, value: Text) -> Text:
    """Return the statement that makes a module a part of ``self``."""
    if name.isidentifier():
        return prefixed(f"self.{name} = ", value)
    return Group("self.add_module(", [literal(name), value])


def _step(text: str, current: nn.Module, key: str) -> str:
    if type(current) in (nn.Sequential, nn.ModuleList):
        keys = list(current._modules)
        if keys == [str(index) for index in range(len(keys))]:
            return f"{text}[{key}]"
    if type(current) is nn.ModuleDict and key in current._modules:
        return f"{text}[{literal(key)}]"
    return f"{text}.{key}" if key.isidentifier() else f"getattr({text}, {literal(key)})"
