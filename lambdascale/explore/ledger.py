"""Answers under way, as a live controller keeps them: which instances own a request, and what its client has got so far.

Messages of instances that own a request no more are dropped, a request's end counts once, and it ends where the control plane
believes it to be when it hears of it (see lambdascale.live.controller.answers, whose rules these are).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import structs

from lambdascale.core.commands import Dispatch, FailRequest, StopInstance, SwitchMode
from lambdascale.core.events import RequestFinished, TokensProduced


@dataclass(slots=True)
class _Answer:
    """``owners``: instances that may add to it. ``begun``: its first token was told. ``produced``: tokens known to exist."""

    owners: set[int] = field(default_factory=set)
    begun: bool = False
    produced: int = 0


class Ledger:
    """Open requests, and those whose end the control plane has still to hear of (``_ended``, by the instance that had them)."""

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}
        self._ended: dict[int, int] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._answers

    def begin(self, request_id: int) -> None:
        """Take a request that has arrived."""
        self._answers[request_id] = _Answer()

    def owners(self, request_id: int) -> set[int]:
        """Return the instances that may add to a request."""
        answer = self._answers.get(request_id)
        return set() if answer is None else answer.owners

    def begun(self, request_id: int) -> bool:
        """True if a request's first token was told, or its end."""
        answer = self._answers.get(request_id)
        return answer is None or answer.begun

    def produced(self, request_id: int) -> int:
        """Return the number of tokens with which a request goes on elsewhere."""
        answer = self._answers.get(request_id)
        return 0 if answer is None or not answer.begun else answer.produced

    def progress(self, request_id: int, produced: int) -> None:
        """Record the tokens of a request that an instance has produced by its stop."""
        answer = self._answers.get(request_id)
        if answer is not None:
            answer.produced = max(answer.produced, produced)

    # -- messages ----------------------------------------------------------------------------------------------------

    def tokens(self, event: TokensProduced) -> TokensProduced | None:
        """Return the first token of a request if an owner produced it and none was told before."""
        answer = self._answers.get(event.request_id)
        if answer is None or event.instance not in answer.owners or answer.begun:
            return None
        answer.begun = True
        return event

    def finish(self, event: RequestFinished) -> RequestFinished | None:
        """End a request that an owner has completed; None if it is not an owner's or has ended."""
        answer = self._answers.get(event.request_id)
        if answer is None or event.instance not in answer.owners:
            return None
        del self._answers[event.request_id]
        self._ended[event.request_id] = event.instance
        return event

    def deliver(self, event: RequestFinished) -> RequestFinished | None:
        """Return a request's end under the instance that the control plane now has it on; None if it gave the request up."""
        instance = self._ended.pop(event.request_id, None)
        return None if instance is None else structs.replace(event, instance=instance)

    # -- commands ----------------------------------------------------------------------------------------------------

    def dispatch(self, command: Dispatch) -> list[int]:
        """Give requests to an instance; return those that it is to work on."""
        going = []
        for request in command.requests:
            answer = self._answers.get(request.request_id)
            if answer is not None:
                answer.owners = {command.instance}
                going.append(request.request_id)
            elif request.request_id in self._ended:
                self._ended[request.request_id] = command.instance
        return going

    def switch(self, command: SwitchMode) -> None:
        """Let the targets of a mode switch add to its requests too."""
        for request_id, target in command.moves:
            answer = self._answers.get(request_id)
            if answer is not None:
                answer.owners.add(target)

    def stop(self, command: StopInstance) -> None:
        """Take an instance's requests from it."""
        for answer in self._answers.values():
            answer.owners.discard(command.instance)

    def fail(self, command: FailRequest) -> None:
        """Give a request up. An end of it that the control plane has not heard of is dropped."""
        self._answers.pop(command.request_id, None)
        self._ended.pop(command.request_id, None)
