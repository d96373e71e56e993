"""The demo: a pair stack on a real protein, each layer timed and checked."""
