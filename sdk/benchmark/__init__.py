"""Measuring every strategy against plain decoding: interleaved, in one process, on the same prompts.

    >>> from skipstone.benchmark.run import BenchOptions, run_bench
    >>> report = run_bench("out/", BenchOptions(strategies=("staged", "auto"), max_new_tokens=64))
    >>> [(row.strategy, row.speedup) for row in report.rows]

docs/benchmarks/README.md says how every figure is defined.
"""
