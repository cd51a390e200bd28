"""``amoeba serve``: an elastic model behind an OpenAI-compatible server, each request within its own time."""
