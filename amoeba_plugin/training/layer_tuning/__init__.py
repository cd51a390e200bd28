"""Layer tuning: exits at prefix depths, each step trains the window of layers below one of them, exits vote.

(Edge-LLM, arXiv:2406.15758.)
"""
