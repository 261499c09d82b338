"""The processes that make videos, apart from the one that is asked for them."""
