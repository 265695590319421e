"""Over many runs: pictures, and later sweeps, reports and reproductions."""
