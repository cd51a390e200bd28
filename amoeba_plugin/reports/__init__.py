"""What a run gained and lost, for people.

In: figures, as one ``Report``. Out: that as JSON, as a page that needs nothing else, as tables in a terminal.
"""
