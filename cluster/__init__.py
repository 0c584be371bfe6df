"""SLURM: the pipeline as a chain of jobs on many machines."""
