"""The tuner: measures plans and keeps the winners. Not there yet."""
