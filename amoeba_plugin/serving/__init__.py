"""One resident elastic model, and requests that bring targets for their time: ELMS (arXiv:2409.09071), without a web.

In: an elastic model, its profile, prompts with targets. Out: which shape and how much of the prompt each request gets.
"""
