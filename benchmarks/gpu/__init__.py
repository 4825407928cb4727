"""``make gpu``: all that needs a GPU, in parts, within a time limit."""
