"""The command line, one file per verb. On import these need click only; the rest waits for a call."""
