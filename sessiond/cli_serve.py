"""`sessiond serve`: the daemon. One flag for each field of Settings (a test compares them)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sessiond.cli_output import fail, progress_bar
from sessiond.errors import SessiondError

# How long torch's threads spin at a barrier before they sleep; libgomp reads it when torch is loaded.
SPIN_COUNT = "5000"


def _flag(help_: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help_.replace("[", r"\["), rich_help_panel=panel, show_default=False)


_SERVED, _ACCESS, _COMPUTE, _MEMORY, _TURNS, _CARE = (
    "What is served",
    "Who may connect",
    "Computing",
    "Memory",
    "Turns",
    "Care of the store",
)


def serve(
    model: Annotated[str | None, _flag("Known name, directory, GGUF file or hub id. [smollm2]", _SERVED)] = None,
    data_dir: Annotated[Path | None, _flag("Token log and state; one daemon at a time.", _SERVED)] = None,
    database_url: Annotated[str | None, _flag("SQL catalog. [SQLite in the data directory]", _SERVED)] = None,
    accept_damage: Annotated[bool | None, _flag("Serve a log known to lack records.", _SERVED)] = None,
    listen: Annotated[str | None, _flag("host:port; port 0 takes a free one. [127.0.0.1:7431]", _ACCESS)] = None,
    insecure_allow_remote: Annotated[bool | None, _flag("Bind beyond loopback without TLS.", _ACCESS)] = None,
    tls_cert: Annotated[Path | None, _flag("PEM certificate chain.", _ACCESS)] = None,
    tls_key: Annotated[Path | None, _flag("PEM private key.", _ACCESS)] = None,
    tls_client_ca: Annotated[Path | None, _flag("PEM roots; clients must have a certificate.", _ACCESS)] = None,
    auth_tokens: Annotated[Path | None, _flag("JSON file {bearer token: tenant}.", _ACCESS)] = None,
    trust_tenant_metadata: Annotated[bool | None, _flag("Believe `sessiond-tenant`.", _ACCESS)] = None,
    metrics_listen: Annotated[str | None, _flag("host:port of Prometheus metrics. [off]", _ACCESS)] = None,
    reflection: Annotated[bool | None, _flag("gRPC reflection. [on loopback only]", _ACCESS)] = None,
    threads: Annotated[int | None, _flag("Threads that compute. [all cores]", _COMPUTE)] = None,
    dtype: Annotated[str | None, _flag("auto, bfloat16 or float32. [auto]", _COMPUTE)] = None,
    weights: Annotated[str | None, _flag("bf16, int8 or int4: other weights, other KV. [bf16]", _COMPUTE)] = None,
    batch_invariant: Annotated[bool | None, _flag("Decode with the same bits as alone. [no]", _COMPUTE)] = None,
    cell_tokens: Annotated[int | None, _flag("128 or 256; fixed with the data directory.", _COMPUTE)] = None,
    seal: Annotated[bool | None, _flag("Make provisional state exact while idle. [yes]", _COMPUTE)] = None,
    memory_budget_bytes: Annotated[int | None, _flag("State in memory. [8 GiB]", _MEMORY)] = None,
    offload: Annotated[bool | None, _flag("Exact KV that is read little lies in a file. [yes]", _MEMORY)] = None,
    idle_seconds: Annotated[float | None, _flag("Idle sessions leave memory. [600]", _MEMORY)] = None,
    max_queued_turns: Annotated[int | None, _flag("Turns that run or wait; more are refused. [256]", _TURNS)] = None,
    detached_turn_seconds: Annotated[float | None, _flag("A turn nobody hears goes on. [60]", _TURNS)] = None,
    stream_before_log: Annotated[bool | None, _flag("Stream before tokens are durable.", _TURNS)] = None,
    delete_retention_seconds: Annotated[float | None, _flag("Deleted sessions stay. [7 days]", _TURNS)] = None,
    settle_seconds: Annotated[float | None, _flag("Pause before state is sealed and written. [0.2]", _TURNS)] = None,
    sweep_seconds: Annotated[float | None, _flag("How often expiry is looked at. [5]", _TURNS)] = None,
    drain_seconds: Annotated[float | None, _flag("SIGTERM lets turns go on. [30]", _TURNS)] = None,
    scrub_bytes_per_second: Annotated[float | None, _flag("Rate of checking again; 0: off. [4e6]", _CARE)] = None,
    archive_idle_seconds: Annotated[float | None, _flag("Ends exports and imports that stall. [60]", _MEMORY)] = None,
    collect_seconds: Annotated[float | None, _flag("Erases unreferenced records; 0: off. [6 h]", _CARE)] = None,
) -> None:
    """Run the daemon until SIGTERM. Every flag is also an environment variable: SESSIOND_<FLAG>."""
    given = {name: value for name, value in locals().items() if value is not None}
    # torch's threads wait for each other a thousand times a token, by default spinning for long: beside one busy
    # process that costs a time slice each (3.3 s a token). A short spin costs nothing alone (decision 0006).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        from pydantic import ValidationError

        from sessiond import modelstore
        from sessiond.config import Settings
        from sessiond.server import serve as run
    except ImportError as error:
        if (error.name or "").startswith("sessiond"):
            raise
        fail(f"the daemon needs {error.name}: pip install 'sessiond[server]'")
    try:
        settings = Settings(**given)
        with progress_bar() as progress:  # fetching and converting take long, the first time
            modelstore.resolve(settings.model, progress=progress)
        run(settings)
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).replace("_", "-")
            fail(f"--{name}: {problem['msg']}")
    except SessiondError as error:
        fail(f"{error.message} ({error.reason})")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
