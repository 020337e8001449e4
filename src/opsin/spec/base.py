"""The base of every description: frozen, closed to unknown keys, comparable by value."""

from typing import Any, Self, get_args

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
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{path}: says no 'kind'")
        else:
            given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
            lines.append(f"{path or 'value'}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the models that `path` leads to. Parts of a path that name no field (a place in a list, the kind
    of a union) lead nowhere else."""
    models = [model]
    for part in path:
        steps = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [found for step in steps for found in _models_in(step)] if steps else models
        chosen = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = chosen or models
    return [name for m in models for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every model that an annotation such as `tuple[A | B, ...] | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
