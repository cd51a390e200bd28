"""What several test files share: models, batches, strategies, recipes, and the scripts that tests run."""
