"""Making what is missing: the plan, how long it will take, the workers."""
