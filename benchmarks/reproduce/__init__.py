"""The paper's tables made again, in the small: ``make reproduce``."""
