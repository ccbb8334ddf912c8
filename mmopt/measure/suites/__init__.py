"""Benchmark suites: folders that pytest collects, timed tests and exact figures in them.

`collection` says what belongs to a suite, `plugin` is what pytest loads, `process` runs pytest;
`run` and `exact` are what `mmopt bench run` and `mmopt bench exact` call.
"""
