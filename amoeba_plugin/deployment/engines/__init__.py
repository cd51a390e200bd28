"""Engines in processes of their own: the loop that a child runs, and what speaks with it.

In: an engine file (a class ``Engine``) and a Python that has what it imports. Out: answers with their times, or an
error of that engine alone, whatever becomes of the process.
"""
