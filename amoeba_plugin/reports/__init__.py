"""What a run gained and lost, for people: one model of the results, as JSON, as a page, as tables in a terminal."""
