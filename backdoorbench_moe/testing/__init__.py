"""Conformance tests: what every trigger, applicator, model, defense and data set keeps to, whoever wrote it.

`bbmoe plugin check PACKAGE` runs them over what an installed package registers and says what fails and why;
`python -m backdoorbench_moe.testing [PACKAGE] [pytest's flags]` is the same with pytest's own output, and runs
over every registered name where there is no PACKAGE. They need pytest: `pip install 'backdoorbench-moe[plugin]'`.

A part says how it is made for them: the class attribute `tiny` holds the options that make it small or short,
and those that have no default; a data set that reads files overrides `write_tiny`.
"""
