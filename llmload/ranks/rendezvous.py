"""The way of one section's ranks to each other: from before a load is planned until all have met.

Imports torch only where there are other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmload.ranks.environment import rank, store_is_there, world_size

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.ranks.meeting import Ranks
    from llmload.ranks.presence import Presence


class Rendezvous:
    """Brings the ranks of a section's loads together, and tells them of one that does not come.

    A plugin that splits models has one, and calls it in its hooks ``started`` and ``stopped`` and
    where its ``init_context`` is entered.

    :param section: the plugin's.
    """

    def __init__(self, section: str) -> None:
        self._section = section
        self._presence: Presence | None = None

    def started(self, asked: Mapping[str, Any], *, splits: bool = True) -> None:
        """Show the other ranks that this one lives, or that it loads something else.

        :param asked: what the hook gets.
        :param splits: whether the section, where it is asked for, has the model split: else no rank
            waits for another.
        """
        if (world_size() or 1) == 1:
            return
        from llmload.ranks.presence import Presence

        if self._section in asked:
            if splits:
                self._presence = Presence(rank())
        elif store_is_there():
            Presence(rank(), elsewhere=self._section)

    def stopped(self, error: BaseException, deadline: float, *, splits: bool = True) -> None:
        """Tell the other ranks, which may have planned well and wait for this one.

        :param deadline: seconds that it may take.
        :param splits: as :meth:`started` has it.
        """
        if splits and world_size() is not None:
            from llmload.ranks.launcher import tell

            tell(error, deadline)
        self._no_longer_planning()

    def meet(self, ctx: LoadContext, connect: Callable[[], None], deadline: float) -> Ranks:
        """Return the ranks of this load; in a group those of its first member with the section.

        They meet once and watch each other until the last plugin's audit, in a group the last
        member's: a rank that fails there, in a member that is not split too, stops the others.

        :param connect: calls :func:`~llmload.plugin.connect`.
        :param deadline: seconds within which a rank that failed, ended or hangs stops all others.
        :raises RequestError: the process was not started by a launcher.
        :raises LoadFailedError: another rank has failed, or does not come.
        """
        from llmload.ranks.meeting import Ranks

        scope = ctx.scope
        try:
            connect()
            # A group's scope outlives the load of one member.
            if self._section not in scope.kept:
                met = Ranks(deadline, lacking=self._section)
                scope.kept[self._section] = scope.until_end.enter_context(met)
        finally:
            self._no_longer_planning()
        ranks: Ranks = scope.kept[self._section]
        return ranks

    def _no_longer_planning(self) -> None:
        if self._presence is not None:
            self._presence.stop()
            self._presence = None
