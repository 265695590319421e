"""Many runs: sweeps, searches and Slurm jobs; reports and comparisons; scaling studies; published results."""
