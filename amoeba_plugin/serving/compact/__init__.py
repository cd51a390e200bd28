"""The compact model: reads a prompt before the elastic model does, scores its tokens, and decides shape and share."""
