"""`make bench`: how long our ways take beside what one would do instead, measured in interleaved pairs."""
