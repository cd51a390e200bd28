"""A recipe from its text to its run: text, plan, plan for a model, run.

In: YAML as llm-compressor reads it, a model, data, a directory. Out: a checkpoint, or a refusal before anything loads.
"""
