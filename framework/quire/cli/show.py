"""`quire config`: what is configured and why, the file's JSON schema, and a file to start from."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml

from quire.cli.console import note, print_table
from quire.cli.flags import engine_flags
from quire.cli.session import open_session
from quire.config import EngineConfig, environment_variable, field_path
from quire.config_values import describe
from quire.loader.checkpoint import BUNDLED, resolve_checkpoint
from quire.resolve import resolve


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="See and write configurations.")
    group.command("show")(show)
    group.command("schema")(schema)
    group.command("init")(init)
    app.add_typer(group, name="config")


@engine_flags()
def show(
    context: typer.Context,
    options: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print every value that would be used, and where it comes from. Loads no weights."""
    session = open_session(context, options)
    config = session.configured.config
    if config.model is None:
        note(f"no model named: shown for the bundled {BUNDLED}")
    resolved = resolve(session.configured, session.host, resolve_checkpoint(config.model, config.revision))
    values = resolved.to_dict()
    origins = {name: _origin(name, config, session.configured.origins, values) for name in values}
    if as_json:
        found = {field_path(name): {"value": values[name], "origin": origins[name]} for name in values}
        typer.echo(json.dumps(found, indent=2))
        return
    rows = [(field_path(name), json.dumps(values[name]), origins[name]) for name in values]
    print_table(("FIELD", "VALUE", "ORIGIN"), rows)


def _origin(name: str, config: EngineConfig, origins: Any, values: dict[str, Any]) -> str:
    """Who said it; for a value that was left open, that it was decided here."""
    said = origins.get(name, "default")
    decided = config.model_dump(mode="json")[name] != values[name] and name != "plugin_options"
    return f"{said}, then decided" if decided else str(said)


def schema() -> None:
    """Print the JSON schema of the configuration file, for editors."""
    typer.echo(json.dumps(file_schema(), indent=2))


def file_schema() -> dict[str, Any]:
    """The file's JSON schema: the fields' own schemas at their paths, nothing else allowed."""
    flat = EngineConfig.model_json_schema()
    root: dict[str, Any] = _section()
    for name in EngineConfig.model_fields:
        *parents, last = field_path(name).split(".")
        node = root
        for part in parents:
            node = node["properties"].setdefault(part, _section())
        described = {key: value for key, value in flat["properties"][name].items() if key not in ("path", "title")}
        node["properties"][last] = described
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Quire configuration", **root}


def _section() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def init() -> None:
    """Print a configuration file with every field, its default and what it means, all commented out."""
    typer.echo(commented_file(), nl=False)


def commented_file() -> str:
    """YAML in which every field is a comment; uncommenting a line sets its default."""
    lines = [
        "# Quire configuration. Remove the '#' before a field (and before its sections) to set it.",
        "# Each field can also be set by the environment variable that is named, or by a flag.",
    ]
    open_sections: list[str] = []
    for name, field in EngineConfig.model_fields.items():
        *parents, last = field_path(name).split(".")
        common = 0
        while common < min(len(parents), len(open_sections)) and parents[common] == open_sections[common]:
            common += 1
        for depth in range(common, len(parents)):
            lines += ([""] if depth == 0 else []) + [f"#{'  ' * depth}{parents[depth]}:"]
        open_sections = parents
        indent = "  " * len(parents)
        lines.append(f"#{indent}# {' '.join((field.description or '').split())}")
        lines.append(f"#{indent}# Allowed: {describe(field)}. {environment_variable(name)}")
        lines.append(f"#{indent}{last}: {_yaml(field.default)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True)).removesuffix("\n...\n").strip()
