"""`sessiond model`: the models that can be fetched by name."""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

import typer
from rich.table import Table

from sessiond.cli_output import AsJson, err, fail, out, print_json, progress_bar
from sessiond.errors import SessiondError

app = typer.Typer(help="Fetch and list models.", no_args_is_help=True)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A name from `sessiond model list`.")] = "smollm2",
    convert: Annotated[bool, typer.Option(help="Also convert it, so that the first start is fast.")] = True,
    as_json: AsJson = False,
) -> None:
    """Fetch a model, verify it, and convert it once."""
    modelstore = _modelstore()
    try:
        with progress_bar() as progress:
            file = modelstore.fetch(name, progress=progress)
            path = modelstore.resolve(name, progress=progress).path if convert else file
    except SessiondError as error:
        fail(error.message)
    if as_json:
        print_json({"name": name, "file": str(file), "path": str(path)})
    else:
        err.print(f"{name} is ready: {path}", markup=False)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the models that can be fetched by name; --model also takes paths and hub ids."""
    known = _modelstore().KNOWN_MODELS.values()
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "title": model.title,
                    "licence": model.licence,
                    "bytes": model.file_bytes,
                    "fetched": model.is_fetched,
                    "converted": model.is_converted,
                    "path": str(model.path),
                }
                for model in known
            ]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "model", "licence", "MB", "here"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for model in known:
        here = "converted" if model.is_converted else "fetched" if model.is_fetched else "no"
        table.add_row(model.name, model.title, model.licence, f"{model.file_bytes / 1e6:.0f}", here)
    out.print(table)


def _modelstore() -> ModuleType:
    try:
        from sessiond import modelstore
    except ImportError as error:
        fail(f"models need {error.name}: pip install 'sessiond[server]'")
    return modelstore
