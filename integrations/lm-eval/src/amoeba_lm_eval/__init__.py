"""The command ``amoeba evaluate``: lm-evaluation-harness on models, elastic models and deployed subnets."""
