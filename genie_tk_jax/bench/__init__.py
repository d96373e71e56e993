"""The benchmark: every stage, layer and core against XLA and other libraries.

All contestants compute the same function of the same inputs, which adapters bring into their own
layout outside of the timed calls: linear layers have no biases (as in AlphaFold 3), weights are
stored in the dtype under test, layer norms in float32, epsilon is 1e-5, and every row and column of
the mask has a valid pair (libraries disagree on rows without one). A contestant is judged against
float32 before it is timed (run.py), timed on the device (timing.py), and set against counted FLOPs
and bytes (workloads.py). Figures are only ever those of the machine that ran it.
"""
