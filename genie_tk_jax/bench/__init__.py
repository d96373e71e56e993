"""The benchmark: every stage, layer and core against XLA and other libraries.

All contestants compute the same function of the same inputs, which adapters bring into their own
layout outside of the timed calls: linear layers have no biases (as in AlphaFold 3), weights are
stored in the dtype under test, layer norms in float32, epsilon is 1e-5, and every row and column of
the mask has a valid pair (libraries disagree on rows without one). A contestant is judged against
float32 before it is timed (judge.py), timed on the device (timing.py), and set against counted
FLOPs and bytes (costs.py). Figures are only ever those of the machine that ran it.

Contestants: "genie" is this library with implementation=None, and its rows say what ran; "xla" is
the layer as a user would write it, plain and unchunked (plain.py), whose memory may not suffice;
"reference" is our implementation='xla', listed where it is not the same as "xla"; the others are
other libraries (peers.py, colabfold.py), round whose attention cores the layer is that of "xla".
"""
