"""Who hands what over: pluggy's markers and manager, look-ups by name, and what registers with the hosts.

In: plug-ins of the entry point group ``amoeba_plugin``, and what the rooms bring themselves. Out: what was handed over,
by name, with who gave it. It knows no room's types: a room has its own ``hooks.py`` (specifications) and ``builtin.py``
(what comes with the package), which are found by these names.
"""
