"""Conformance tests, which every part must pass: trigger, applicator, attack, splitter, gate and so on.

`bbmoe plugin check PACKAGE` runs them over the parts that an installed package registers, and prints which tests
fail and why. `python -m backdoorbench_moe.testing [PACKAGE] [flags]` runs the same tests with pytest's own output
and flags, over all registered parts if no PACKAGE is given. They need pytest:
`pip install 'backdoorbench-moe[plugin]'`.

A part tells the tests two things by class attributes:

- `tiny`: the options that make the part small or short, and those that have no default. A data set that reads files
  also overrides `write_tiny`.
- `deviations`: tests that the part is known to fail, with a reason for each, as in
  `{"test_gradients_reach_the_images": "rounds to 8 bits"}`. Such a failure is shown but does not count. A deviation
  is itself a failure of the part if it names a test that does not run over the part, or one of which every case
  passes.
"""
