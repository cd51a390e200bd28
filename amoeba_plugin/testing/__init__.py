"""What the author of a plug-in subclasses in their own tests, and the built-in methods are held to themselves.

It needs pytest to run, not to be imported.
"""
