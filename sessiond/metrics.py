"""Prometheus metrics of a running daemon: read from its counters when scraped, nothing on the token path."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sessiond.desk import Desk
from sessiond.errors import UnsafeAddress


class DeskCollector(Collector):
    """What a Desk knows without touching a disk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def collect(self) -> Iterable[Metric]:
        desk, counters = self.desk, self.desk.engine.counters
        tokens = CounterMetricFamily("sessiond_tokens", "Tokens by what was done with them", labels=["work"])
        for work, count in (
            ("prefilled", counters.prefilled),
            ("decoded", counters.decoded),
            ("sealed", counters.sealed),
            ("probed", counters.probed),
            ("recomputed", counters.recomputed),
            ("restored", desk.restored_tokens),
            ("reused", desk.reused_tokens),
        ):
            tokens.add_metric([work], count)
        yield tokens
        yield CounterMetricFamily("sessiond_engine_steps", "Steps of the engine", value=counters.steps)
        seconds = CounterMetricFamily("sessiond_engine_seconds", "Time of the engine's steps", labels=["part"])
        seconds.add_metric(["step"], counters.step_seconds)
        seconds.add_metric(["forward"], counters.forward_seconds)
        yield seconds
        yield GaugeMetricFamily("sessiond_turns_running", "Turns in progress", value=len(desk.turns))
        yield GaugeMetricFamily("sessiond_sessions_hot", "Sessions whose KV is in memory", value=desk.hot_sessions)
        yield GaugeMetricFamily("sessiond_kv_memory_bytes", "KV in memory", value=desk.hot_bytes)
        yield GaugeMetricFamily("sessiond_disk_free_bytes", "Free space at the data", value=desk.store.free_bytes())
        yield GaugeMetricFamily("sessiond_store_read_only", "1: no writes until restart", value=desk.store.read_only)
        scrub = desk.scrub
        yield CounterMetricFamily("sessiond_scrubbed_bytes", "Bytes checked by the scrub", value=scrub.n_bytes)
        found = CounterMetricFamily("sessiond_scrub_findings", "Damage found by the scrub", labels=["severity"])
        found.add_metric(["repairable"], scrub.repaired)
        found.add_metric(["loss"], scrub.losses)
        yield found


def serve_metrics(desk: Desk, listen: str) -> Callable[[], None]:
    """Serve `/metrics` on host:port from a thread of its own; returns what stops it. Raises UnsafeAddress."""
    registry = CollectorRegistry()
    registry.register(DeskCollector(desk))
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise UnsafeAddress(f"cannot bind {listen} for metrics: {error}", address=listen) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
