"""The algorithms, one file each."""

if __name__ != "recsim_gr.agents":
    raise ImportError(f"import recsim_gr.agents instead of {__name__}")
