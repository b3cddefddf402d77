"""Conformance tests, which every part must pass: trigger, applicator, attack, splitter, gate and so on.

`bbmoe plugin check PACKAGE` runs them on the parts of an installed package, and prints which tests fail and why.
`python -m backdoorbench_moe.testing [PACKAGE] [flags]` runs the same tests with pytest's output and flags, on all
registered parts if no PACKAGE is given. The tests need pytest: `pip install 'backdoorbench-moe[plugin]'`.

A part configures the tests with two class attributes:

- `tiny`: options that make the part small or fast, and those without a default. A data set that reads files also
  overrides `write_tiny`.
- `deviations`: tests that the part is known to fail, with a reason for each, as in
  `{"test_gradients_reach_the_images": "rounds to 8 bits"}`. Such failures are shown but do not count. A deviation is
  an error if it names a test that does not run on the part, or a test that passes in all cases.
"""
