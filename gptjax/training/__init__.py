"""The pure train step, the loop around it, and the run folder that it leaves."""
