"""How several workers share the tests: a file is one worker's, and the server and the browser are for one alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of pytest-xdist that does so."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::")[0])
            return "e2e" if "e2e" in path.parts else path.name

        def remove_node(self, node: WorkerController) -> str | None:
            """Take a worker's tests off it: the one that it died in, if it did, is told and not run again.

            xdist's own gives finished files again as well. A worker that gets one finishes nothing, so it asks for no
            more, and all wait for ever.
            """
            units = self.assigned_work.pop(node).items()
            left = {scope: {test: False for test, is_done in unit.items() if not is_done} for scope, unit in units}
            pending = [(scope, test) for scope, unit in left.items() for test in unit]
            if not pending:
                return None
            scope, crashed = pending[0]
            del left[scope][crashed]
            self.workqueue.update({scope: unit for scope, unit in left.items() if unit})
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

    return ByFile(config, log)
