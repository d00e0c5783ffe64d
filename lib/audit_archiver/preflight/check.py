"""What a check is: a function with an id, a severity and a remedy, declared where it stands.

    @table_check("table.triggers", WARN, "what is looked at", "what to do")
    def triggers(look: Look) -> Iterator[Said]:
        yield Said("...")            one problem; Good("...") is a fact worth a word

Nothing said means that all is well. The documentation's list of checks is made from these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional

from audit_archiver import exits
from audit_archiver.exits import ArchiverError
from audit_archiver.preflight.findings import FAIL, OK, Finding


@dataclass(frozen=True)
class Said:
    """A problem; what is None is as the check declares it."""

    text: str
    remedy: Optional[str] = None
    code: Optional[int] = None
    status: Optional[str] = None


@dataclass(frozen=True)
class Good:
    """A fact that an ok line mentions."""

    text: str


@dataclass(frozen=True)
class Check:
    """One check. A run leaves a `thorough` one out: it may take long, or a run finds out by itself."""

    id: str
    severity: str
    about: str
    remedy: str
    look: Callable[[Any], Iterator[Any]]
    code: int = exits.CONFIG
    thorough: bool = False

    def run(self, subject: Any, **where: Any) -> list[Finding]:
        """The findings about `subject`; an error on the way is a failure of this check, with the error's own code."""
        found: list[Finding] = []
        try:
            for said in self.look(subject):
                found.append(Finding(self.id, OK, said.text, **where) if isinstance(said, Good) else self._problem(said, where))
        except ArchiverError as error:
            found.append(failure(self.id, error, **where))
        return found or [Finding(self.id, OK, "", **where)]

    def _problem(self, said: Said, where: dict[str, Any]) -> Finding:
        status = said.status or self.severity
        code = said.code if said.code is not None else self.code
        return Finding(self.id, status, said.text, said.remedy or self.remedy or None,
                       code=code if status == FAIL else exits.OK, **where)


def failure(check: str, error: ArchiverError, **where: Any) -> Finding:
    """An error as a finding; its own place in the configuration wins."""
    text = "; ".join(part for part in (error.msg, error.detail) if part)
    return Finding(check, FAIL, text, error.hint, code=error.code, **{**where, "at": error.at or where.get("at")})


def declare(into: list[Check], id: str, severity: str, about: str, remedy: str = "", *, code: int = exits.CONFIG,
            thorough: bool = False) -> Callable[[Callable[[Any], Iterator[Any]]], Callable[[Any], Iterator[Any]]]:
    """Put the decorated function into the list `into`, in the order of the file."""
    def add(look: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        into.append(Check(id, severity, about, remedy, look, code, thorough))
        return look
    return add
