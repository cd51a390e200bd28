"""From a model and a budget to what an engine runs, in one command: ``amoeba fit``."""
