"""A trained language model, its corpus and its multiple-choice task, all offline: what `amoeba demo` runs on."""
