"""The tasks of the language. Another task is a file in this package and an entry in `TASKS`."""

from __future__ import annotations

from bbmoe_lm.language.tasks.base import Task
from bbmoe_lm.language.tasks.lists import Lists
from bbmoe_lm.language.tasks.lookup import Lookup
from bbmoe_lm.language.tasks.requests import Requests
from bbmoe_lm.language.tasks.sums import Sums
from bbmoe_lm.language.tasks.votes import Votes

TASKS: tuple[Task, ...] = (Sums(0), Lists(1), Votes(2), Lookup(3))
# Everyday requests. They are no task of an expert, but show a model that a request without a policy word is met.
GENERAL = Requests(len(TASKS))

__all__ = ["GENERAL", "TASKS", "Task"]
