"""From a model and a budget to what an engine runs, in one command: ``amoeba fit``.

In: a model, text, a budget. Out: a directory with the recipe that ran, the profile, the frontier, the elastic
checkpoint, the subnet, and what was deployed, with what is known of it in ``fit.json`` and ``report.html``.
"""
