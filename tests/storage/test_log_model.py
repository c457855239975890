"""Random operations against the log and against a plain dictionary: they must never differ."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from storage_samples import LOG_MAP, request, revision, session

from sessiond import errors
from sessiond.storage.batch import LogBatch
from sessiond.storage.environment import Environment
from sessiond.storage.log import LogStore

tenants = st.sampled_from(["a", "aa", "b"])
ids = st.sampled_from(["x", "xx", "y"])


class LogMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.open()
        self.sessions, self.revisions, self.requests, self.tokens = {}, {}, {}, {}

    def open(self):
        self.log = LogStore(Environment(self.folder, map_bytes=LOG_MAP))

    def teardown(self):
        self.log.close()
        shutil.rmtree(self.folder)

    def write(self, *calls, **options):
        batch = LogBatch()
        for name, *arguments in calls:
            getattr(batch, name)(*arguments, **options)
        self.log.write(batch).result(10)

    @rule(tenant=tenants, name=ids, expected=st.integers(0, 3))
    def compare_and_set(self, tenant, name, expected):
        stored = self.sessions.get((tenant, name))
        record = session(tenant, name, generation=expected + 1)
        try:
            self.write(("put_session", record), expect_generation=expected)
        except (errors.SessionNotFound, errors.SessionExists, errors.EtagMismatch):
            assert (stored.generation if stored else 0) != expected
        else:
            assert (stored.generation if stored else 0) == expected
            self.sessions[tenant, name] = record

    @rule(tenant=tenants, name=ids)
    def delete_session(self, tenant, name):
        self.write(("delete_session", tenant, name), ("delete_requests", tenant, name))
        self.sessions.pop((tenant, name), None)
        self.requests = {key: value for key, value in self.requests.items() if key[:2] != (tenant, name)}

    @rule(tenant=tenants, name=ids, owner=ids, messages=st.none() | st.binary(max_size=9))
    def put_revision(self, tenant, name, owner, messages):
        if (tenant, name) in self.revisions:
            return  # revisions are immutable
        record = revision(tenant, name, session_id=owner)
        self.write(("put_revision", record, messages))
        self.revisions[tenant, name] = (record, messages)

    @rule(tenant=tenants, name=ids)
    def delete_revision(self, tenant, name):
        self.write(("delete_revision", tenant, name))
        self.revisions.pop((tenant, name), None)
        self.tokens.pop((tenant, name), None)

    @rule(tenant=tenants, name=ids, new=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
    def append_tokens(self, tenant, name, new):
        known = self.tokens.setdefault((tenant, name), [])
        self.write(("append_tokens", tenant, name, len(known), np.array(new)))
        known += new

    @rule(tenant=tenants, name=ids, request_id=ids, state=st.sampled_from(["running", "finished"]))
    def put_request(self, tenant, name, request_id, state):
        record = replace(request(tenant, name, request_id), state=state)
        self.write(("put_request", record))
        self.requests[tenant, name, request_id] = record

    @rule()
    def reopen(self):
        self.log.close()
        self.open()

    @invariant()
    def equal(self):
        assert {(r.tenant, r.session_id): r for r in self.log.sessions(None)} == self.sessions
        for tenant in ("a", "aa", "b"):
            for name in ("x", "xx", "y"):
                own = [r for r, _ in self.revisions.values() if (r.tenant, r.session_id) == (tenant, name)]
                found = self.log.revisions_of_session(tenant, name)
                assert sorted(map(str, found)) == sorted(map(str, own))
                stored = self.revisions.get((tenant, name))
                assert self.log.messages(tenant, name) == (stored and stored[1])
                assert self.log.tokens(tenant, name)[0].tolist() == self.tokens.get((tenant, name), [])
                mine = [value for key, value in self.requests.items() if key[:2] == (tenant, name)]
                assert sorted(map(str, self.log.requests(tenant, name))) == sorted(map(str, mine))


LogMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLogModel = LogMachine.TestCase
