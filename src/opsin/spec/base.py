"""The base of every description: frozen, closed to unknown keys, comparable by value."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from opsin.errors import ConfigError, nearest


class Spec(BaseModel):
    """A frozen description. Unknown keys are an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Self:
        """Build from plain data (JSON or YAML). Raises ConfigError listing every problem with its path.

        where: the file or option the data came from, for the message.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{where}: {describe(error, cls)}") from None

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some fields changed."""
        unknown_fields = [name for name in changes if name not in type(self).model_fields]
        if unknown_fields:
            hint = nearest(unknown_fields[0], type(self).model_fields)
            raise ConfigError(f"{type(self).__name__} has no field {unknown_fields[0]!r}{hint}")
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: dotted path, what is wrong, and the nearest known key for a misspelt one."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            lines.append(f"unknown key {path!r}{nearest(str(item['loc'][-1]), known)}")
        else:
            given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
            lines.append(f"{path or 'value'}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model reached by walking `path`; every field name of the tree when the walk is unclear."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = fields[part].annotation
    return list(getattr(current, "model_fields", model.model_fields))
