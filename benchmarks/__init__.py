"""The suites, their runner and their report."""

if __name__ != "recsim_gr.benchmarks":
    raise ImportError(f"import recsim_gr.benchmarks instead of {__name__}")
