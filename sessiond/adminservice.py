"""The gRPC service Admin: what the daemon is and does, and the care of its store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import grpc

from sessiond import wireadmin, wireout
from sessiond.auth import Principals
from sessiond.care import Care
from sessiond.desk import Desk
from sessiond.diskuse import disk_totals
from sessiond.errors import NotImplementedYet
from sessiond.policies.registry import POLICIES
from sessiond.sessions import Sessions
from sessiond.v1 import admin_pb2 as admin
from sessiond.v1 import types_pb2 as types
from sessiond.v1.admin_pb2_grpc import AdminServicer

Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(AdminServicer):
    """sessiond.v1.Admin."""

    def __init__(
        self,
        sessions: Sessions,
        care: Care,
        identity: dict[str, str],
        profile: dict[str, str],
        principals: Principals,
    ) -> None:
        self.sessions = sessions
        self.care = care
        self.identity = identity
        self.profile = profile
        self.tenant = principals.tenant
        self.started_us = Desk.now_us()
        self.started = time.monotonic()

    async def GetServerInfo(self, request: admin.GetServerInfoRequest, context: Context) -> admin.GetServerInfoResponse:
        self.tenant(context)
        desk = self.sessions.desk
        state = admin.SERVER_STATE_DRAINING if self.sessions.draining else admin.SERVER_STATE_SERVING
        return admin.GetServerInfoResponse(
            version=version("sessiond"),
            capabilities=["sealing", "resume", "revisions", "archives", "branches", "shared_prefixes"],
            model=self.sessions.model_name,
            identity=types.ModelIdentity(identity_id=desk.identity_id, fields=self.identity),
            numerics_profile=admin.NumericsProfile(fields=self.profile),
            kernels={name: self.profile[name] for name in ("layers", "attention")},
            cell_tokens=desk.store.cell_tokens,
            max_context_tokens=desk.max_context,
            start_time=wireout.timestamp(self.started_us),
            data_directory=str(desk.store.root),
            state=state,
            policies=sorted(POLICIES),
        )

    async def GetStats(self, request: admin.GetStatsRequest, context: Context) -> admin.GetStatsResponse:
        self.tenant(context)
        desk = self.sessions.desk
        usage = await desk.in_pool(disk_totals, desk.store)
        counters = desk.engine.counters
        hot = desk.hot_sessions
        response = admin.GetStatsResponse(
            sessions_by_tier={"hot": hot, "cold": usage.sessions - usage.deleted - hot},
            sessions_deleted=usage.deleted,
            turns_running=len(desk.turns),
            turns_queued=max(0, len(desk.places) - len(desk.turns)),
            turns_suspended=max(0, usage.suspended - len(desk.turns)),  # a running one is open as well
            memory_bytes_by_tier={"device": desk.hot_bytes},
            memory_budget_bytes_by_tier={"device": desk.settings.memory_budget_bytes},
            disk=wireadmin.disk_usage(usage, desk.store.free_bytes()),
            tokens=admin.TokenTotals(
                prefilled=counters.prefilled,
                decoded=counters.decoded,
                restored=desk.restored_tokens,
                recomputed=counters.recomputed,
                sealed=counters.sealed,
                reused=desk.reused_tokens,
            ),
            gauges={
                "kv_coded_page_bytes": float(usage.coded_pages),
                "engine_steps": float(counters.steps),
                "engine_step_seconds": counters.step_seconds,
                "engine_forward_seconds": counters.forward_seconds,
                "store_read_only": float(desk.store.read_only),
                "disk_reserve_used": float(not desk.store.has_space),
                "scrubbed_bytes": float(desk.scrub.n_bytes),
                "scrub_rounds": float(desk.scrub.rounds),
                "scrub_repaired": float(desk.scrub.repaired),
                "scrub_losses": float(desk.scrub.losses),
                "collected": float(self.care.collected),
            },
            sample_time=wireout.timestamp(desk.now_us()),
        )
        response.uptime.FromNanoseconds(int((time.monotonic() - self.started) * 1e9))
        return response

    async def WatchStats(
        self, request: admin.WatchStatsRequest, context: Context
    ) -> AsyncIterator[admin.GetStatsResponse]:
        raise NotImplementedYet("WatchStats is not served by this version")
        yield

    async def VerifyStore(
        self, request: admin.VerifyStoreRequest, context: Context
    ) -> AsyncIterator[admin.VerifyStoreResponse]:
        self.tenant(context)
        steps = self.care.verify(
            request.session_ids, recompute=request.recompute, seed=request.seed, repair=request.repair
        )
        async with contextlib.aclosing(steps) as replies:
            async for step in replies:
                yield wireadmin.verify_event(step)

    async def CompactStore(self, request: admin.CompactStoreRequest, context: Context) -> admin.CompactStoreResponse:
        self.tenant(context)
        done = await self.care.compact(purge_deleted=request.purge_deleted)
        return admin.CompactStoreResponse(
            before=wireadmin.disk_usage(done.before, done.free_before),
            after=wireadmin.disk_usage(done.after, done.free_after),
            sessions_purged=done.sessions_purged,
            records_erased=done.records_erased,
            milliseconds=done.milliseconds,
        )

    async def DrainServer(self, request: admin.DrainServerRequest, context: Context) -> admin.DrainServerResponse:
        raise NotImplementedYet("DrainServer is not served by this version")
