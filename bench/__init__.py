"""Benchmarks of a checkout: suites against cuDNN, a report, and the run that gathers all evidence on a GPU."""
