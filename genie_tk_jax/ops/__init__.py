"""The functional API, one file an op: signature, reference, stages and derivative."""
