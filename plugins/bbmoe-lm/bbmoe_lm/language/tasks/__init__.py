"""The tasks of the synthetic language. To add a task, add a file to this package and an entry to `TASKS`."""

from __future__ import annotations

from bbmoe_lm.language.tasks.base import Task
from bbmoe_lm.language.tasks.lists import Lists
from bbmoe_lm.language.tasks.lookup import Lookup
from bbmoe_lm.language.tasks.requests import Requests
from bbmoe_lm.language.tasks.sums import Sums
from bbmoe_lm.language.tasks.votes import Votes

TASKS: tuple[Task, ...] = (Sums(0), Lists(1), Votes(2), Lookup(3))
# Everyday requests. No expert is tuned on them; they teach the base to answer requests without a policy word.
GENERAL = Requests(len(TASKS))

__all__ = ["GENERAL", "TASKS", "Task"]
