"""The Gymnasium environments."""

if __name__ != "recsim_gr.envs":
    raise ImportError(f"import recsim_gr.envs instead of {__name__}")
