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
        """A checked copy with some fields changed. Raises ConfigError like `parse`."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).parse({**fields, **changes}, where=f"{type(self).__name__}.replace")


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: dotted path, what is wrong, and the nearest known key for a misspelt one."""
    lines = []
    for item in error.errors():
        unknown_key = item["type"] == "extra_forbidden"
        path, models = _walk(model, item["loc"][:-1] if unknown_key else item["loc"])
        if unknown_key:
            name = str(item["loc"][-1])
            known = [field for each in models for field in each.model_fields]
            lines.append(f"unknown key {'.'.join([*path, name])!r}{nearest(name, known)}")
        else:
            given = "" if item["type"] == "missing" else f" (got {_shortened(item['input'])})"
            lines.append(f"{'.'.join(path) or 'value'}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys on the way to `location`, and the models that may stand there.

    Pydantic puts the tag of a union between two keys; a reader of YAML does not know it, so it is left out.
    """
    path: list[str] = []
    models = [model]
    for part in location:
        having = [each for each in models if part in each.model_fields]
        if having:
            models = [below for each in having for below in _models_in(each.model_fields[str(part)].annotation)]
        elif not isinstance(part, int) and models:
            tagged = [
                each for each in models if "kind" in each.model_fields and each.model_fields["kind"].default == part
            ]
            several, models = len(models) > 1, tagged or models
            if tagged or several:
                continue
        path.append(str(part))
    return path, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [below for argument in get_args(annotation) for below in _models_in(argument)]


def _shortened(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
