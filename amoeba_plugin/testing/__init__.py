"""What the author of a plug-in subclasses in their own tests, and the built-in methods are held to themselves.

In: a tiny configuration. Out: tests, to be run by pytest, which importing this does not need.
"""
