"""`make bench-gpu`: what one NVIDIA GPU makes of the house's steps, beside what it could make of them (G1 to G10)."""
