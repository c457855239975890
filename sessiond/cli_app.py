"""The commands, put together."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from sessiond import cli_archive, cli_chat, cli_doctor, cli_explain, cli_model, cli_serve, cli_sessions, cli_store
from sessiond.cli_output import out

app = typer.Typer(
    name="sessiond",
    help="A daemon that keeps what a language model remembers of every conversation.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(importlib.metadata.version("sessiond"), markup=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


app.command()(cli_serve.serve)
app.command()(cli_chat.chat)
cli_sessions.app.command()(cli_archive.export)
cli_sessions.app.command("import")(cli_archive.import_)
app.add_typer(cli_sessions.app, name="sessions")
app.add_typer(cli_model.app, name="model")
app.command()(cli_explain.explain)
app.command()(cli_store.verify)
app.command()(cli_store.compact)
app.command()(cli_doctor.doctor)
