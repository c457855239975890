"""What a store of sessions should hold, kept in plain dictionaries: the state machine's other side."""

from __future__ import annotations

from dataclasses import dataclass, field

from fake_model import answer_to


@dataclass
class Asked:
    """A turn that was asked for: what it adds and what it must say."""

    request_id: str
    new: tuple[int, ...]
    max_tokens: int
    answer: list[int]
    base: str

    @property
    def digest(self) -> str:
        return repr((self.new, self.max_tokens))


@dataclass
class PlainSession:
    """A session: where its head is, whether it is deleted, its turns by request and the one that stands open."""

    head: str
    root: str
    deleted: bool = False
    done: dict[str, tuple[Asked, str]] = field(default_factory=dict)  # request id -> turn, revision
    given_up: set[str] = field(default_factory=set)  # requests that ended without a revision
    open: Asked | None = None
    own: list[str] = field(default_factory=list)  # its revisions, oldest first
    fork_point: str | None = None
    rollbacks: int = 0


@dataclass
class PlainStore:
    """All sessions, and the whole token history that each revision ends."""

    sessions: dict[str, PlainSession] = field(default_factory=dict)
    history: dict[str, list[int]] = field(default_factory=dict)
    parent: dict[str, str | None] = field(default_factory=dict)
    n_requests: int = 0

    def ask(self, session_id: str, new: tuple[int, ...], max_tokens: int) -> Asked:
        """A fresh turn on the head; 0 tokens: nothing is to be generated."""
        self.n_requests += 1
        head = self.sessions[session_id].head
        answer = answer_to([*self.history[head], *new], max_tokens)
        return Asked(f"turn-{self.n_requests}", new, max_tokens, answer, head)

    def created(self, session_id: str, root: str, ids: list[int]) -> None:
        self.sessions[session_id] = PlainSession(root, root, own=[root])
        self.history[root], self.parent[root] = ids, None

    def committed(self, session_id: str, asked: Asked, revision: str) -> None:
        session = self.sessions[session_id]
        session.done[asked.request_id] = asked, revision
        session.head, session.open = revision, None
        session.own.append(revision)
        self.parent[revision] = asked.base
        self.history[revision] = [*self.history[asked.base], *asked.new, *asked.answer]

    def tree(self, session_id: str) -> list[str]:
        """Every revision that the session can go back to, its own and those before it was forked."""
        session = self.sessions[session_id]
        before = self.branch(session.fork_point) if session.fork_point else []
        return [*before, *session.own]

    def forked(self, session_id: str, fork_id: str, revision: str) -> None:
        root = self.sessions[session_id].root
        self.sessions[fork_id] = PlainSession(revision, root, fork_point=revision)

    def imported(self, import_id: str, root: str, head: str, copies: dict[str, str]) -> None:
        """A new session of copies: their names by the names of what was exported, oldest first."""
        self.sessions[import_id] = PlainSession(copies[head], copies[root], own=list(copies.values()))
        for name, copy in copies.items():
            parent = self.parent[name]
            self.history[copy] = self.history[name]
            self.parent[copy] = copies[parent] if parent else None

    def branch(self, head: str) -> list[str]:
        """The revisions that lead to this one, oldest first."""
        found: list[str] = []
        at: str | None = head
        while at is not None:
            found.append(at)
            at = self.parent[at]
        return found[::-1]

    def purge_deleted(self) -> int:
        """Forget deleted sessions; what forks of them need stays."""
        doomed = [name for name, session in self.sessions.items() if session.deleted]
        for name in doomed:
            del self.sessions[name]
        return len(doomed)

    def rolled_back(self, session_id: str, revision: str) -> None:
        self.gave_up(session_id)
        self.sessions[session_id].head = revision
        self.sessions[session_id].rollbacks += 1

    def gave_up(self, session_id: str) -> None:
        session = self.sessions[session_id]
        if session.open:
            session.given_up.add(session.open.request_id)
        session.open = None
