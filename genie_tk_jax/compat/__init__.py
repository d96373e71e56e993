"""Other libraries' functions under their own signatures: change the import line, nothing else."""
